"""The unfinished directory of another rank's checkpoint, for those who write their share into it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

from keepstep.checkpoint.place.local import explained
from keepstep.files import Files, SegmentFile

__all__ = ["JoinedWorkspace"]


class JoinedWorkspace:
    """A `Workspace` that rank 0 opens, commits and discards; this rank only adds files.

    Args:
        files: how the disk is changed.
        path: the unfinished directory.
        final: where it will lie once rank 0 commits it.
    """

    def __init__(self, files: Files, path: Path, final: Path) -> None:
        self.path = path
        self.final = final
        self._files = files

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

    def create_segment(self, name: str, size_bytes: int) -> SegmentFile:
        return self._files.create_segment(self.path / name, size_bytes)

    def write_file(self, name: str, data: bytes) -> None:
        self._files.write_file(self.path / name, data)

    def link(self, name: str, source_checkpoint: str, source_file: str, size_bytes: int) -> str | None:
        source = self.final.parent / source_checkpoint / source_file
        found = os.stat(source, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size_bytes:
            raise FileNotFoundError(errno.ENOENT, "not what was committed", str(source))
        self._files.link(source, self.path / name)
        return None

    def commit(self, manifest: bytes) -> None:
        """Nothing: rank 0 commits."""

    def discard(self) -> None:
        """Nothing: rank 0 removes the directory, or the next process that writes does."""
