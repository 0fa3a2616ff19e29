"""Locks that go with their process: who writes to a store, and whose a directory is.

A file system without locks refuses none: what they guard is guarded by names that can be taken once, too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

from keepstep.files import NOT_SUPPORTED, PAGE_BYTES

__all__ = ["DirectoryLock", "StoreLock"]


class StoreLock:
    """One writing process a store: an advisory record lock on a small file.

    A record lock (not flock) is used since children don't inherit it: a killed run's data-loader
    workers may outlive it for seconds, and must not keep the next attempt out. It goes with the
    process, however that ends. Within a process every store of one path shares the lock.
    """

    _held: dict[Path, tuple[int, int]] = {}  # noqa: RUF012  (path -> pid, fd; one registry a process)
    _guard = threading.Lock()

    @classmethod
    def acquire(cls, path: Path, owner: bytes) -> bytes | None:
        """Take the lock for this process, for good.

        Returns:
            None if this process holds it now, else what the holder wrote about itself.
        """
        path = path.resolve()
        with cls._guard:
            if cls._holds(path):
                return None
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.pread(fd, PAGE_BYTES, 0)
                os.close(fd)
                if error.errno in {errno.EACCES, errno.EAGAIN}:
                    return holder
                if error.errno in NOT_SUPPORTED | {errno.ENOLCK}:
                    return None  # a file system without locks: the rename still refuses a taken name
                raise
            os.ftruncate(fd, 0)
            os.pwrite(fd, owner, 0)
            cls._held[path] = (os.getpid(), fd)
            return None

    @classmethod
    def _holds(cls, path: Path) -> bool:
        """Whether this process holds it; not so any more if the file was moved away or deleted."""
        pid, fd = cls._held.get(path, (0, -1))
        if pid != os.getpid():  # after a fork the copied registry says nothing about the child
            return False
        try:
            return os.path.samestat(os.fstat(fd), os.stat(path))
        except FileNotFoundError:
            return False

    @classmethod
    def start_anew_after_fork(cls) -> None:
        """Another thread of the parent may have been inside; its lock would never be released here."""
        cls._guard = threading.Lock()


os.register_at_fork(after_in_child=StoreLock.start_anew_after_fork)


class DirectoryLock:
    """Marks a directory as somebody's: an unfinished one that is not to be swept, one that is being read.

    Args:
        path: the directory.
        shared: beside others that share it; else it is held alone.
        wait: until whoever holds it (a sweep that looks at it) lets go, instead of raising BlockingIOError.
    """

    def __init__(self, path: Path, *, shared: bool = False, wait: bool = False) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
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
            os.close(fd)
