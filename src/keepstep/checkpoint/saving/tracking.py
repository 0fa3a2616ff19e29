"""Has anything written to this memory? The kernel's answer, where it has one.

Torch's version counters can't prove that a tensor is unchanged: writes through `.data`, NumPy or another
library don't count. The kernel sees every write: whole pages are write-protected with userfaultfd in its
asynchronous mode, in which the first write to a page lifts the protection and costs about a microsecond,
and `PAGEMAP_SCAN` tells which pages are still protected (Linux 6.7 and later; containers often forbid
userfaultfd, and then nothing is proved). What is no private memory of this process alone (shared,
file-backed or pinned for a device) is never taken for proved.

Source: Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst of the Linux kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import struct
import threading
from dataclasses import dataclass

import torch

from keepstep.checkpoint.format.manifest import digest_of
from keepstep.files import PAGE_BYTES

__all__ = ["KnownDigests", "WriteTracker"]

_SYSCALLS = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1  # all that an unprivileged process may ask for
_API = 0xAA
_FEATURES = (1 << 13) | (1 << 15)  # WP_UNPOPULATED, WP_ASYNC
_MODE_WP = 2
_WP_ON = 1

_IS_WRITTEN, _IS_FILE, _IS_PRESENT, _IS_SWAPPED = 1 << 1, 1 << 2, 1 << 3, 1 << 4
_CHECK_WPASYNC = 1 << 1


def _request(letter: int, number: int, size: int) -> int:
    return (3 << 30) | (size << 16) | (letter << 8) | number


_UFFDIO_API = _request(_API, 0x3F, 24)
_UFFDIO_REGISTER = _request(_API, 0x00, 32)
_UFFDIO_WRITEPROTECT = _request(_API, 0x06, 24)
_PAGEMAP_SCAN = _request(ord("f"), 16, 96)


class WriteTracker:
    """Watches ranges of this process's memory for writes.

    Raises:
        OSError: the kernel can't, or may not.
    """

    def __init__(self) -> None:
        number = _SYSCALLS.get(platform.machine())
        if number is None or os.sysconf("SC_PAGE_SIZE") != PAGE_BYTES:
            raise OSError("write tracking is not known for this platform")
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self._pagemap = -1
        try:
            fcntl.ioctl(self._fd, _UFFDIO_API, struct.pack("QQQ", _API, _FEATURES, 0))
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise

    def watch(self, begin: int, end: int) -> bool:
        """Protect whole pages from `begin` to `end`, addresses; False if the kernel refuses."""
        try:
            fcntl.ioctl(self._fd, _UFFDIO_REGISTER, struct.pack("QQQQ", begin, end - begin, _MODE_WP, 0))
            fcntl.ioctl(self._fd, _UFFDIO_WRITEPROTECT, struct.pack("QQQ", begin, end - begin, _WP_ON))
        except OSError:
            return False
        return True

    def untouched(self, begin: int, end: int) -> bool:
        """Whether every page is there, and was not written to since it was watched."""
        return self._all_pages_lack(_IS_WRITTEN, begin, end)

    def is_private(self, begin: int, end: int) -> bool:
        """Whether every page is there, and is no page of a file (or of shared memory).

        This looks into the kernel's record of each page and takes ten times as long as `untouched`.
        """
        return self._all_pages_lack(_IS_FILE, begin, end)

    def _all_pages_lack(self, unwanted: int, begin: int, end: int) -> bool:
        region = (ctypes.c_uint64 * 3)()
        question = struct.pack(
            "12Q",
            96,
            _CHECK_WPASYNC,
            begin,
            end,
            0,
            ctypes.addressof(region),
            1,
            0,
            unwanted,  # inverted: pages that are not
            unwanted,
            _IS_PRESENT | _IS_SWAPPED,  # a page that was given back holds zeros, and was not written to
            unwanted,
        )
        try:
            found = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, bytearray(question))
        except OSError:
            return False
        return found == 1 and (region[0], region[1]) == (begin, end)

    def close(self) -> None:
        """Watch nothing any more; what was protected is free again."""
        for fd in (self._fd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._fd = self._pagemap = -1

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()


_Range = tuple[int, int]
"""Address and size in bytes."""


@dataclass(slots=True)
class _Known:
    edges: tuple[bytes, bytes]
    digest: str | None = None  # not yet: it is being hashed


class KnownDigests:
    """Digests of tensors that provably have not been written to since they were hashed.

    The pages wholly inside a tensor are watched; the bytes before and after them, which share their pages
    with other memory, are kept and compared. Of tensors that overlap one is watched, the last that was asked
    about.
    """

    _LEAST_BYTES = 1 << 20
    _MOST = 4096  # each may split a mapping of the process in three, and the kernel allows some 65,000

    def __init__(self) -> None:
        self._tracker: WriteTracker | None = None
        self._refused = False
        self._known: dict[_Range, _Known] = {}
        self._resting: set[_Range] = set()
        self._asked: set[_Range] = set()
        self._watching = threading.Lock()

    def next_save(self) -> None:
        """Forget memory that the last save did not ask about; it may be another tensor's by now."""
        self._known = {key: known for key, known in self._known.items() if key in self._asked}
        self._resting &= self._asked
        self._asked = set()

    def proves(self, tensor: torch.Tensor, expected: str) -> bool:
        """Whether a tensor's bytes have this digest, as far as that is known without reading them."""
        if not self._can_watch(tensor):
            return False
        key = tensor.data_ptr(), tensor.nbytes
        self._asked.add(key)
        with self._watching:
            return self._proved_digest(key) == expected

    def matches(self, tensor: torch.Tensor, data: memoryview, expected: str) -> bool:
        """Whether a tensor's bytes have this digest; read only if they are not proved to hold still.

        Memory is watched from the second time on that it is what was expected: a watched page costs its
        first writer a microsecond, which only pays for what rests.

        Args:
            tensor: whose bytes they are.
            data: all of them, in the tensor's own memory.
            expected: the digest that they had.
        """
        key = tensor.data_ptr(), tensor.nbytes
        if not self._can_watch(tensor):
            return digest_of(data) == expected
        self._asked.add(key)
        pages, now = _whole_pages(key), _Known(_edges(key))
        tracker = self._tracker
        assert tracker is not None, "opened by _can_watch"
        with self._watching:
            proved = self._proved_digest(key)
            if proved is not None:
                return proved == expected
            if key in self._resting:
                self._forget_overlapping(key)
                if len(self._known) < self._MOST and tracker.watch(*pages):
                    self._known[key] = now  # before it is hashed: a write while we hash is seen
        digest = digest_of(data)
        if digest == expected:
            self._resting.add(key)
        else:
            self._resting.discard(key)
        if self._known.get(key) is now and tracker.is_private(*pages):  # all pages are there: they were read
            now.digest = digest
        return digest == expected

    def _proved_digest(self, key: _Range) -> str | None:
        """The digest of memory that has not been written to since it was hashed; None if it may have been."""
        known = self._known.get(key)
        if known is None or known.edges != _edges(key) or self._tracker is None:
            return None
        return known.digest if self._tracker.untouched(*_whole_pages(key)) else None

    def _forget_overlapping(self, key: _Range) -> None:
        """To watch a page anew is to forget that it was written to, for whichever tensor it was watched."""
        begin, end = key[0], key[0] + key[1]
        for other in [at for at in self._known if at[0] < end and begin < at[0] + at[1]]:
            del self._known[other]

    def _can_watch(self, tensor: torch.Tensor) -> bool:
        if self._refused or tensor.nbytes < self._LEAST_BYTES:
            return False
        hidden = tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg()
        if hidden or not tensor.is_contiguous() or _is_shared(tensor) or tensor.is_pinned():
            return False
        if self._tracker is None:
            try:
                self._tracker = WriteTracker()
            except OSError:
                self._refused = True
        return not self._refused


def _whole_pages(key: _Range) -> _Range:
    """Where the pages that lie wholly inside a tensor begin and end, addresses."""
    return -(-key[0] // PAGE_BYTES) * PAGE_BYTES, (key[0] + key[1]) // PAGE_BYTES * PAGE_BYTES


def _edges(key: _Range) -> tuple[bytes, bytes]:
    """The bytes before and after those pages."""
    begin, end = _whole_pages(key)
    return ctypes.string_at(key[0], begin - key[0]), ctypes.string_at(end, key[0] + key[1] - end)


def _is_shared(tensor: torch.Tensor) -> bool:
    return bool(tensor.is_shared())  # type: ignore[no-untyped-call]
