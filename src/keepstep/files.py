"""Files that survive power cuts: the one place where bytes are made durable.

Everything that changes the disk goes through one `Files` object, so that a test can fail any single
write, fsync, link or rename. No torch here: looking at checkpoints is cheap.

Platform differences are decided here and nowhere else: O_DIRECT where the file system takes it, else
buffered writes; an atomic exchange of two directories where the kernel has it, else two renames; hard
links, else copies.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from keepstep.outcome import Outcome, wait_for_all

__all__ = [
    "NOT_SUPPORTED",
    "PAGE_BYTES",
    "Files",
    "LocalFiles",
    "SegmentFile",
    "free_bytes",
    "yield_to_others",
]

PAGE_BYTES = 4096
"""O_DIRECT wants offsets, lengths and addresses in multiples of this."""

_SYNC_THREADS = 8
"""So many files are synced at once: the file system writes its journal once for all of them."""

NOT_SUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EXDEV, errno.EPERM}
"""How a file system says that it has no such operation."""


class SegmentFile(Protocol):
    """A file of known size that several threads fill at once."""

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`; both multiples of `PAGE_BYTES`, as is the data's address."""

    def stop(self) -> None:
        """Let every `write_at` end soon, with an error if need be: the file is not wanted any more."""

    def finish(self) -> None:
        """Cut the file to its size, make it durable (unless `sync` is to) and close it."""

    def abandon(self) -> None:
        """Close it without any promise."""


class Files(Protocol):
    """Every operation that changes the disk. Each either happens or raises OSError."""

    def make_directory(self, path: Path) -> None:
        """Make `path` and its missing parents; parents of new directories are made durable."""

    def make_unfinished(self, path: Path) -> None:
        """Make one directory that may be gone after a power cut until it is renamed and that is synced."""

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        """Create a file of `size_bytes`, durable when finished unless `sync` is to; it must not exist."""

    def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Create or replace a small file, and make its bytes durable (not its name) unless `sync` is to."""

    def make_file(self, path: Path, write: Callable[[Path], object]) -> None:
        """Have `write` create or replace a file of any size, and make its bytes durable (not its name)."""

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""

    def sync(self, directory: Path, names: Sequence[str]) -> None:
        """Make the names in a directory durable, and files and directories below it, in whatever order."""

    def rename(self, source: Path, target: Path) -> None:
        """Rename within a file system; a directory replaces an empty one."""

    def exchange(self, first: Path, second: Path) -> bool:
        """Swap two names atomically; False if this system can't."""

    def link(self, source: Path, target: Path) -> None:
        """Make `target` hold what `source` holds: a hard link, else a durable copy."""

    def remove_file(self, path: Path) -> None:
        """Remove one file."""

    def remove_directory(self, path: Path) -> None:
        """Remove one empty directory."""

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and all below it; never follows links."""


class _LocalSegment:
    def __init__(self, path: Path, size_bytes: int, *, durable: bool) -> None:
        self._size_bytes = size_bytes
        self._durable = durable
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        self._direct = False
        try:
            self._fd = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
            self._direct = hasattr(os, "O_DIRECT")
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            # The file system may have made the name before it refused the flag.
            path.unlink(missing_ok=True)
            self._fd = os.open(path, flags, 0o666)
        _segments.add(self)
        if self._direct and size_bytes:
            self._reserve()

    def _reserve(self) -> None:
        """Find out that the disk is full before writing, and lay the file out in one piece."""
        try:
            _allocate(self._fd, self._size_bytes)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                self.abandon()
                raise

    def write_at(self, data: memoryview, offset: int) -> None:
        while data:
            direct = self._direct  # before the write: another thread may leave direct mode meanwhile
            try:
                written = os.pwrite(self._fd, data, offset)
            except OSError as error:
                if not (direct and error.errno == errno.EINVAL):
                    raise
                self._leave_direct()
                continue
            if written % PAGE_BYTES and written < len(data):
                self._leave_direct()  # a short direct write leaves us unaligned
            data, offset = data[written:], offset + written

    def _leave_direct(self) -> None:
        """Some file systems take the flag at open and refuse it at write."""
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
        self._direct = False

    def stop(self) -> None:
        """A write to a file ends by itself."""

    def finish(self) -> None:
        try:
            os.ftruncate(self._fd, self._size_bytes)
            if self._durable or not self._direct:  # what lies in the page cache need not wait for the others
                os.fsync(self._fd)
        finally:
            self.abandon()

    def abandon(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


_segments: weakref.WeakSet[_LocalSegment] = weakref.WeakSet()


def _close_after_fork() -> None:
    """What a child has open takes room on the disk as long as it lives, even once it is deleted."""
    for segment in list(_segments):
        segment.abandon()


os.register_at_fork(after_in_child=_close_after_fork)


class LocalFiles:
    """`Files` on a local or network file system."""

    def make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        self.make_directory(path.parent)
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise FileExistsError(errno.EEXIST, f"{path} is there and is no directory") from None
        self.sync_directory(path.parent)

    def make_unfinished(self, path: Path) -> None:
        path.mkdir()

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        return _LocalSegment(path, size_bytes, durable=durable)

    def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)

    def make_file(self, path: Path, write: Callable[[Path], object]) -> None:
        write(path)
        _sync_file(path)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:  # some network file systems can't sync a directory
                raise
        finally:
            os.close(fd)

    def sync(self, directory: Path, names: Sequence[str]) -> None:
        # At once: each alone would make the file system write its journal, and wait for the disk.
        paths = [directory / name for name in names]
        count = min(len(paths), _SYNC_THREADS)
        outcomes = [self._sync_behind(paths[start::count]) for start in range(count)]
        try:
            self.sync_directory(directory)
        finally:
            wait_for_all(outcomes)
        for outcome in outcomes:
            outcome.result()

    def _sync_behind(self, paths: Sequence[Path]) -> Outcome[None]:
        """Make files and directories durable on a thread, or at once if there is none to be had."""
        outcome: Outcome[None] = Outcome()
        sync = partial(outcome.settle, partial(self._sync_all, paths))
        try:
            threading.Thread(target=sync, name="keepstep-sync", daemon=True).start()
        except RuntimeError:
            sync()
        return outcome

    def _sync_all(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.is_dir():
                self.sync_directory(path)
            else:
                _sync_file(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def exchange(self, first: Path, second: Path) -> bool:
        return _exchange(os.fsencode(first), os.fsencode(second))

    def link(self, source: Path, target: Path) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED | {errno.EMLINK}:
                raise
            shutil.copy2(source, target, follow_symlinks=False)
            if not target.is_symlink():
                _sync_file(target)

    def remove_file(self, path: Path) -> None:
        os.unlink(path)

    def remove_directory(self, path: Path) -> None:
        os.rmdir(path)

    def remove_tree(self, path: Path) -> None:
        shutil.rmtree(path)


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _allocate(fd: int, size_bytes: int) -> None:
    """fallocate(2), which Python does not wrap.

    Not posix_fallocate(3): where the file system has no such call, the C library writes a byte into each of
    its blocks instead. On a network that is a request for every 4 KiB.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    while fallocate is not None:
        if fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _exchange(first: bytes, second: bytes) -> bool:
    """renameat2(2) with RENAME_EXCHANGE, which Python does not wrap."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), os.fsdecode(first), None, os.fsdecode(second))


def free_bytes(path: Path) -> int | None:
    """Bytes that this process may still write where `path` is, or will be; None if the system doesn't say."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        found = os.statvfs(path)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None


_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30}
_THIS_THREAD = 0
_IDLE_CLASS = 3 << 13


def yield_to_others() -> None:
    """Give the calling thread the lowest priority for processors and disks, as far as the platform can."""
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        number = _IOPRIO_SET.get(platform.machine())
        if number is not None and sys.platform == "linux":
            ctypes.CDLL(None).syscall(number, 1, _THIS_THREAD, _IDLE_CLASS)
    except (OSError, AttributeError):
        return
