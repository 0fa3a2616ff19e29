"""Files of the disk -> files of a checkpoint: read once, hashed and written by several threads. No torch."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from keepstep.checkpoint.crew import in_threads
from keepstep.checkpoint.format.hashing import Aborted, OrderedHasher
from keepstep.checkpoint.format.manifest import FileEntry
from keepstep.checkpoint.place.backend import Workspace
from keepstep.errors import DirectoryNotSavableError
from keepstep.files import PAGE_BYTES, SegmentFile
from keepstep.outcome import Latch
from keepstep.pages import huge_pages

__all__ = ["Copier", "SourceFile", "check_unchanged", "reading_source", "stamp_of"]

_THREADS: Final = 4
_BLOCK_BYTES: Final = 8 << 20
_SMALL_BYTES: Final = 256 << 10
"""Up to here a file is written in one call, through the system's cache."""

Stamp = tuple[int, int, int, int]
"""What is another once a file was replaced or written to."""


class SourceFile(NamedTuple):
    """A file that is to be copied.

    Attributes:
        name: in the checkpoint.
        path: where it lies.
        bytes: its size.
        stamp: what it was when it was found.
    """

    name: str
    path: str
    bytes: int
    stamp: Stamp


def stamp_of(found: os.stat_result) -> Stamp:
    """Device, inode, size and time of the last write."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def reading_source(path: str) -> Iterator[None]:
    """Turn the system's refusals to read what was handed over into keepstep's error.

    Raises:
        DirectoryNotSavableError: it vanished, or can't be read.
    """
    try:
        yield
    except FileNotFoundError:
        raise DirectoryNotSavableError(
            f"{path} vanished while it was saved; nothing was committed. Remove or change what you hand over "
            "only after the call that saves it has returned"
        ) from None
    except OSError as error:
        raise DirectoryNotSavableError(
            f"{path} can't be read ({error.strerror or error}); nothing was committed"
        ) from error


def check_unchanged(source: SourceFile) -> None:
    """See that a file is still what was found.

    Raises:
        DirectoryNotSavableError: it is not.
    """
    with reading_source(source.path):
        found = os.lstat(source.path)
    if stamp_of(found) != source.stamp:
        raise _changed(source.path)


def _changed(path: str) -> DirectoryNotSavableError:
    return DirectoryNotSavableError(
        f"{path} was written to or replaced while it was saved; nothing was committed. Change what you hand "
        "over only after the call that saves it has returned"
    )


class Copier:
    """Copies files; its memory is kept for the next time.

    Args:
        threads: how many at most.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._threads = threads
        self._blocks: list[memoryview] = []

    def copy(self, workspace: Workspace, sources: Sequence[SourceFile]) -> dict[str, FileEntry]:
        """Copy files into an unfinished checkpoint; their bytes are durable on return.

        Raises:
            DirectoryNotSavableError: one changed, vanished, or can't be read.
            OSError: the place refuses.
        """
        work = _Copying(workspace, sources)
        count = min(self._threads, work.parts)
        while len(self._blocks) < count:
            self._blocks.append(huge_pages(_BLOCK_BYTES))
        try:
            work.run(self._blocks[:count])
        finally:
            work.close()
        return {source.name: work.entries[source.name] for source in sources}


class _Target:
    """One file under way."""

    def __init__(self, workspace: Workspace, source: SourceFile) -> None:
        self.source = source
        self.digest = ""
        self._workspace = workspace
        self._segment: SegmentFile | None = None
        self._left = -(-source.bytes // _BLOCK_BYTES) or 1
        self._counting = threading.Lock()
        with reading_source(source.path):
            self._fd = os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        if source.bytes > _BLOCK_BYTES:  # several threads share it
            try:
                self._segment = workspace.create_segment(source.name, source.bytes)
            except BaseException:
                self.close()  # nobody else knows of it yet
                raise

    def read(self, view: memoryview, begin: int) -> None:
        """Fill `view` from `begin`."""
        done = 0
        while done < len(view):
            with reading_source(self.source.path):
                count = os.preadv(self._fd, [view[done:]], begin + done)
            if count == 0:
                raise _changed(self.source.path)
            done += count

    def write(self, block: memoryview, size: int, begin: int) -> None:
        """Write the first `size` bytes of a block to `begin`."""
        name = self.source.name
        if self.source.bytes <= _SMALL_BYTES:
            self._workspace.write_file(name, bytes(block[:size]))
            return
        if self._segment is None:
            self._segment = self._workspace.create_segment(name, self.source.bytes)
        self._segment.write_at(block[: -(-size // PAGE_BYTES) * PAGE_BYTES], begin)

    def is_last_part(self) -> bool:
        """Whether the part that was written just now was the last one to be."""
        with self._counting:
            self._left -= 1
            return self._left == 0

    def finish(self) -> FileEntry:
        """Make it durable, and see that it is what was found."""
        if self._segment is not None:
            self._segment.finish()
        with reading_source(self.source.path):
            now = os.fstat(self._fd)
        if stamp_of(now) != self.source.stamp:
            raise _changed(self.source.path)
        check_unchanged(self.source)
        return FileEntry(bytes=self.source.bytes, digest=self.digest)

    def stop(self) -> None:
        """Let writes end soon."""
        if self._segment is not None:
            self._segment.stop()

    def close(self) -> None:
        """Let go of both files; what is not finished is not wanted."""
        if self._segment is not None:
            self._segment.abandon()
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class _Copying:
    """One call of `Copier.copy`."""

    def __init__(self, workspace: Workspace, sources: Sequence[SourceFile]) -> None:
        self.entries: dict[str, FileEntry] = {}
        self.parts = sum(-(-source.bytes // _BLOCK_BYTES) or 1 for source in sources)
        self._workspace = workspace
        self._sources = sources
        self._aborted = Latch()
        self._hasher = OrderedHasher(self._aborted)
        self._open: dict[str, _Target] = {}
        self._taking = threading.Lock()
        self._handed_out = self._hand_out()

    def _hand_out(self) -> Iterator[tuple[_Target, int]]:
        for source in self._sources:
            target = self._open[source.name] = _Target(self._workspace, source)
            for begin in range(0, source.bytes or 1, _BLOCK_BYTES):
                yield target, begin

    def run(self, blocks: Sequence[memoryview]) -> None:
        """Copy everything, one thread for each block of memory."""
        if len(blocks) == 1:
            self._copy_parts(blocks[0])
            return
        free = queue.SimpleQueue[memoryview]()
        for block in blocks:
            free.put(block)
        errors = in_threads(
            lambda: self._copy_parts(free.get()), len(blocks), name="keepstep-copy", stop=self._abort
        )
        for error in sorted(errors, key=lambda error: isinstance(error, Aborted)):
            raise error

    def _copy_parts(self, block: memoryview) -> None:
        try:
            while not self._aborted.is_open:
                with self._taking:
                    part = next(self._handed_out, None)
                if part is None:
                    return
                self._copy_part(block, *part)
        except BaseException:
            self._abort()
            raise

    def _copy_part(self, block: memoryview, target: _Target, begin: int) -> None:
        source = target.source
        size = min(_BLOCK_BYTES, source.bytes - begin)
        target.read(block[:size], begin)
        digest = self._hasher.feed(source.name, begin, source.bytes, block[:size])
        if digest is not None:
            target.digest = digest
        target.write(block, size, begin)
        if target.is_last_part():
            self.entries[source.name] = target.finish()
            target.close()
            del self._open[source.name]

    def _abort(self) -> None:
        self._aborted.open()
        self._hasher.wake()
        for target in list(self._open.values()):
            target.stop()

    def close(self) -> None:
        """Let go of what is not finished; no thread is at it any more."""
        for target in self._open.values():
            target.close()
