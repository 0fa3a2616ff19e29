"""Locks that go with their process: who writes to a store, and whose a directory is.

On a file system without locks the names that can be taken once guard what they would, and what the writer
says about itself in the lock's file, as far as it can be checked from here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from keepstep.files import NOT_SUPPORTED, PAGE_BYTES

__all__ = ["DirectoryLock", "StoreLock"]


class StoreLock:
    """One writing process a store: an advisory lock on a small file.

    It goes with the process, however that ends. Within one every store of a directory shares the lock.
    It belongs to what was opened here (an OFD lock), so that it stays when the process opens and closes the
    file elsewhere, as a backup of the directory does; a record lock, which would be gone then, only where
    the system has no other. Children let go of it: a killed run's data-loader workers may outlive it for
    seconds, and must not keep the next attempt out.
    """

    _held: dict[tuple[int, int], int] = {}  # noqa: RUF012  (device and inode -> fd; one registry a process)
    _guard = threading.RLock()

    @classmethod
    def acquire(
        cls, path: Path, owner: bytes, *, lives: Callable[[bytes], bool] = lambda _: False
    ) -> bytes | None:
        """Take the lock for this process, for good.

        Args:
            path: the file.
            owner: what to write into it about this process.
            lives: whether the process that wrote this about itself runs; asked where there are no locks.

        Returns:
            None if this process holds it now, else what the holder wrote about itself.
        """
        with cls._guard:
            if cls._holds(path):
                return None
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                holder = _locked_by_another(fd, lives)
                if holder is None:
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, owner, 0)
                    found = os.fstat(fd)
                    cls._held[found.st_dev, found.st_ino] = fd
                return holder
            finally:
                if fd not in cls._held.values():
                    os.close(fd)

    @classmethod
    def _holds(cls, path: Path) -> bool:
        """Whether this process holds it; not so any more if the file was moved away or deleted."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) in cls._held

    @classmethod
    def start_anew_after_fork(cls) -> None:
        """What is held is the parent's. Another thread of it may have been inside and never leaves here."""
        cls._guard = threading.RLock()
        held, cls._held = cls._held, {}
        for fd in held.values():
            os.close(fd)


os.register_at_fork(after_in_child=StoreLock.start_anew_after_fork)

_WHOLE_FILE: Final = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64 bits


def _locked_by_another(fd: int, lives: Callable[[bytes], bool]) -> bytes | None:
    """Lock a file for who has it open as `fd`; what its holder wrote into it, if another has locked it."""
    try:
        _lock_alone(fd)
    except OSError as error:
        holder = os.pread(fd, PAGE_BYTES, 0)
        if error.errno in {errno.EACCES, errno.EAGAIN}:
            return holder
        if error.errno not in NOT_SUPPORTED | {errno.ENOLCK}:
            raise
        # A file system without locks: what is written there keeps others of this machine out.
        return holder if lives(holder) else None
    return None


def _lock_alone(fd: int) -> None:
    """Lock a file for who has it open as `fd`.

    Raises:
        OSError: somebody else has locked it, or it can't be locked.
    """
    if hasattr(fcntl, "F_OFD_SETLK") and struct.calcsize("P") == 8:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
        else:
            return
    fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class DirectoryLock:
    """Marks a directory as somebody's: an unfinished one that is not to be swept, one that is being read.

    Args:
        path: the directory.
        shared: beside others that share it; else it is held alone.
        wait: until whoever holds it (a sweep that looks at it) lets go, instead of raising BlockingIOError.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait: bool = False) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._pid = os.getpid()
        self.supported = True
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(self._fd, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            self.supported = False

    def holds(self, path: Path) -> bool:
        """Whether the directory at `path` is the one that is locked: it may have been swept just before."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.stat(path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go; safe to call twice."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._pid == os.getpid():  # closing it is not enough: children that were forked have it open
                with contextlib.suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
