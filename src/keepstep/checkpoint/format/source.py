"""Where a committed checkpoint's files are read from. `LocalSource` is a directory. No torch.

Whoever reads a checkpoint goes through a `Source`: a directory and a bucket are read by the same code. A
`Path` stands for the `LocalSource` of that directory wherever a `Place` is asked for.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Protocol, TypeAlias

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, FileEntry
from keepstep.checkpoint.format.names import parents_of
from keepstep.errors import FileSizeError, ManifestError, MissingFileError

__all__ = [
    "LocalSource",
    "OpenFile",
    "Place",
    "Source",
    "has_plain_parents",
    "place_exists",
    "source_of",
]


class OpenFile(Protocol):
    """One file of a checkpoint, open for reading by several threads."""

    @property
    def size_bytes(self) -> int:
        """Its size as the place says."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a file, and no device or directory."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill (the beginning of) `view` from `offset`; return how many bytes, 0 at the end of the file."""

    def read(self, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`; fewer at the end of the file, or if the place gives fewer."""

    def map(self) -> mmap.mmap | None:
        """The file as private memory, read when touched; None if the place can't."""

    def forget_cached(self) -> None:
        """Have the system not keep what was read of it, where it can be told so; what others map stays."""

    def close(self) -> None:
        """Let go of it."""


class Source(Protocol):
    """The files of one committed checkpoint. `str()` says where it is."""

    @property
    def name(self) -> str:
        """The checkpoint's name, as "checkpoint_12"."""

    @property
    def place(self) -> Place:
        """What messages and reports call it: the directory, or the source itself."""

    @property
    def read_threads(self) -> int:
        """How many reads at once are worth while."""

    def exists(self) -> bool:
        """Whether it is (still) there; says nothing about its health."""

    def has_manifest(self) -> bool:
        """Whether it has a manifest, readable or not."""

    def read_small(self, name: str, limit_bytes: int, within: str | None = None) -> bytes:
        """Read a file whole.

        Args:
            name: of the file.
            limit_bytes: most that it may have.
            within: see `FileEntry`.

        Raises:
            ManifestError: it is missing, no plain file, can't be read, or has more than `limit_bytes`.
        """

    def state_of(self, name: str) -> Hashable | None:
        """What is another once a file was replaced or written to; None if it is missing or can't be told."""

    def check_files(self, files: Mapping[str, FileEntry]) -> None:
        """See that every file is there and of its size; reads no content.

        Raises:
            MissingFileError, FileSizeError, ManifestError: naming the file.
        """

    def held(self, files: Mapping[str, FileEntry]) -> dict[Hashable, int]:
        """Bytes of its files by what tells them apart where they lie: shared ones have one identity."""

    def open(self, name: str, entry: FileEntry) -> OpenFile:
        """Open a file for reading, never through a link; raises OSError."""


Place: TypeAlias = Path | Source
"""A directory, or any other source."""


def source_of(place: Place) -> Source:
    """The source at a place."""
    return LocalSource(place) if isinstance(place, Path) else place


def place_exists(place: Place) -> bool:
    """Whether anything is (still) there; a link counts, wherever it points."""
    return os.path.lexists(place) if isinstance(place, Path) else place.exists()


_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_INTO = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NORESERVE = 0x4000 if sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64") else 0
_PRIVATE = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", _NORESERVE)
"""Only pages that are written to take memory: Linux would ask for room for all of them."""


def has_plain_parents(directory: Path, name: str, known: set[str]) -> bool:
    """Whether what leads from a checkpoint's directory to a file of it are directories, and no links.

    Args:
        directory: of the checkpoint.
        name: of the file.
        known: directories that were looked at before; added to.
    """
    if "/" not in name or name.rpartition("/")[0] in known:
        return True
    for parent in parents_of(name):
        if parent not in known:
            try:
                found = os.lstat(os.path.join(directory, parent))
            except FileNotFoundError:
                return True  # what is not there leads nowhere
            if not stat.S_ISDIR(found.st_mode):
                return False
            known.add(parent)
    return True


def _open_within(directory: Path, name: str) -> int:
    """Open a file for reading; nothing on the way may be a link."""
    if "/" not in name:
        return os.open(directory / name, _FLAGS)
    *parents, last = name.split("/")
    fd = os.open(directory, _INTO)
    try:
        for parent in parents:
            inner = os.open(parent, _INTO | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        return os.open(last, _FLAGS, dir_fd=fd)
    finally:
        os.close(fd)


class _LocalFile:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._found = os.fstat(fd)

    @property
    def size_bytes(self) -> int:
        return self._found.st_size

    @property
    def is_plain(self) -> bool:
        return stat.S_ISREG(self._found.st_mode)

    def read_into(self, view: memoryview, offset: int) -> int:
        return os.preadv(self._fd, [view], offset)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def map(self) -> mmap.mmap:
        return mmap.mmap(self._fd, self.size_bytes, flags=_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def forget_cached(self) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)


def _read_all(fd: int, size_bytes: int) -> bytes:
    """The first so many bytes of a file, or fewer if it ends before."""
    data = os.read(fd, size_bytes)
    while len(data) < size_bytes and (more := os.read(fd, size_bytes - len(data))):
        data += more
    return data


class LocalSource:
    """A checkpoint directory on a file system."""

    read_threads = 4  # while some copy and hash, others keep the disk busy: see decision 0013

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __str__(self) -> str:
        return str(self._directory)

    @property
    def name(self) -> str:
        return self._directory.name

    @property
    def place(self) -> Path:
        return self._directory

    def exists(self) -> bool:
        return self._directory.is_dir()

    def has_manifest(self) -> bool:
        try:
            os.lstat(self._directory / MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # it may well have one: the system does not let us look
            return True
        return True

    def read_small(self, name: str, limit_bytes: int, within: str | None = None) -> bytes:
        directory = self._directory
        try:
            fd = os.open(directory / name, _FLAGS)
        except FileNotFoundError:
            raise ManifestError(directory, f"{name} is missing; this is not a whole checkpoint") from None
        except OSError as error:
            raise ManifestError(
                directory, f"{name} can't be opened as a plain file ({error.strerror})"
            ) from error
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ManifestError(directory, f"{name} is not a plain file")
            if found.st_size > limit_bytes:
                raise ManifestError(directory, f"{name} is larger than {limit_bytes} bytes")
            return _read_all(fd, found.st_size)
        except OSError as error:
            raise ManifestError(directory, f"{name} can't be read ({error.strerror})") from error
        finally:
            os.close(fd)

    def state_of(self, name: str) -> Hashable | None:
        try:
            found = os.lstat(os.path.join(self._directory, name))
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def check_files(self, files: Mapping[str, FileEntry]) -> None:
        directory = self._directory
        known: set[str] = set()
        for name, entry in files.items():
            if not has_plain_parents(directory, name, known):
                raise ManifestError(directory, f"{name} lies behind a link; links are not followed")
            try:
                found = os.lstat(os.path.join(directory, name))  # one call a file: a list has thousands
            except FileNotFoundError:
                raise MissingFileError(
                    directory, f"the file {name} ({entry.bytes} bytes) is missing"
                ) from None
            except OSError as error:
                raise MissingFileError(
                    directory, f"the file {name} can't be looked at ({error.strerror})"
                ) from error
            if not stat.S_ISREG(found.st_mode):
                raise ManifestError(
                    directory, f"{name} is not a plain file; links and devices are not followed"
                )
            if found.st_size != entry.bytes:
                raise FileSizeError(
                    directory,
                    f"{name} has {found.st_size} bytes, but {entry.bytes} were committed: "
                    "it was cut or extended",
                )

    def held(self, files: Mapping[str, FileEntry]) -> dict[Hashable, int]:
        """Files by device and inode: two names of one file are one file."""
        found: dict[Hashable, int] = {}
        for name in files:
            try:
                seen = os.lstat(os.path.join(self._directory, name))
            except OSError:
                continue
            found[seen.st_dev, seen.st_ino] = seen.st_size
        return found

    def open(self, name: str, entry: FileEntry) -> OpenFile:
        return _LocalFile(_open_within(self._directory, name))
