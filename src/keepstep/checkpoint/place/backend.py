"""What every place for checkpoints can do. `local.py` is a directory on a file system."""

from __future__ import annotations

from typing import Protocol

from keepstep.files import SegmentFile

__all__ = ["Workspace"]


class Workspace(Protocol):
    """An unfinished checkpoint. Published whole by `commit`, or gone after `discard`."""

    def open(self) -> None:
        """Make room for it; clear what dead processes left of the same checkpoint."""

    def create_segment(self, name: str, size_bytes: int) -> SegmentFile:
        """Create a segment of `size_bytes`, to be filled by several threads; it must not exist."""

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file; its bytes are durable on return."""

    def link(self, name: str, checkpoint: str, file: str, size_bytes: int) -> str | None:
        """Make `name` hold what `file` of a committed checkpoint of the same store holds.

        Returns:
            None if it is a file of this checkpoint now, else the name of the checkpoint that holds it.

        Raises:
            FileNotFoundError: it is gone, or is not what was committed.
        """

    def commit(self, manifest: bytes) -> None:
        """Make everything durable, then publish the checkpoint in one step."""

    def discard(self) -> None:
        """Remove what was written. Never raises: the error that led here is the one that counts."""
