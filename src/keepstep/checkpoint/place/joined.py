"""The unfinished directory of another rank's checkpoint, for those who write their share into it."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path

from keepstep.checkpoint.format.manifest import FileEntry
from keepstep.checkpoint.place.local import CommittedFiles, explained, link_whole
from keepstep.files import Files, SegmentFile

__all__ = ["JoinedWorkspace"]


class JoinedWorkspace:
    """A `GuestWorkspace`: rank 0 opens, commits and discards the directory, this rank only adds files.

    Args:
        files: how the disk is changed.

    Attributes:
        path: the unfinished directory.
        final: where it will lie once rank 0 commits it.
    """

    within = None

    def __init__(self, files: Files) -> None:
        self.path = self.final = Path()
        self._files = files
        self._committed = CommittedFiles()

    def accept(self, invitation: str) -> None:
        self.path, self.final = map(Path, json.loads(invitation))

    def check(self) -> None:
        """Nothing: rank 0 has checked."""

    def explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.final)

    def open(self) -> None:
        """See that it is there: ranks of several machines need a file system that they share."""
        if not self.path.is_dir():
            raise FileNotFoundError(
                errno.ENOENT,
                "what rank 0 made is not there for this rank; all ranks must see one file system",
                str(self.path),
            )

    def make_directory(self, name: str) -> None:
        self._files.make_directory(self.path / name)

    def create_segment(self, name: str, size_bytes: int) -> SegmentFile:
        return self._files.create_segment(self.path / name, size_bytes)

    def write_file(self, name: str, data: bytes) -> None:
        self._files.write_file(self.path / name, data)

    def link(self, name: str, checkpoint: str, file: str, committed: FileEntry) -> str | None:
        source = self._committed.find(self.final.parent / checkpoint, file, committed)
        link_whole(self._files, source, self.path / name)
        return None

    def adopt(self, name: str, path: Path) -> None:
        self._files.link(path, self.path / name)

    def commit(self, manifest: bytes) -> None:
        """Nothing: rank 0 commits."""

    def leave(self) -> None:
        """Nothing: it is rank 0's directory."""

    def discard(self) -> None:
        """Nothing: rank 0 removes the directory, or the next process that writes does."""
