"""What every place for checkpoints can do. `directory.py` is a directory on a file system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, Protocol

from keepstep.checkpoint.format.manifest import FileEntry
from keepstep.checkpoint.format.source import Place
from keepstep.files import SegmentFile

__all__ = [
    "INTERNAL_NAME",
    "Backend",
    "GuestWorkspace",
    "HostWorkspace",
    "Workspace",
    "checkpoint_name",
]

INTERNAL_NAME: Final = ".keepstep"
"""keepstep's own corner of a store: the lock, the trash, and damaged checkpoints that were set aside."""


def checkpoint_name(number: int) -> str:
    """The name of the checkpoint with this number."""
    return f"checkpoint_{number}"


class Workspace(Protocol):
    """An unfinished checkpoint. Published whole by `commit`, or gone after `discard`."""

    @property
    def final(self) -> Place:
        """Where it will lie once it is committed."""

    @property
    def within(self) -> str | None:
        """What the manifest has to say in `FileEntry.within` of files that were written here."""

    def check(self) -> None:
        """See whether a checkpoint may be published there; writes nothing.

        Raises:
            DirectoryNotOursError: it holds something else.
        """

    def explained(self) -> AbstractContextManager[None]:
        """Turn the place's refusals within a block into keepstep's errors."""

    def open(self) -> None:
        """Make room for it; clear what dead processes left of the same checkpoint."""

    def make_directory(self, name: str) -> None:
        """Make a directory within it, and those that lead there; writing a file makes them as well."""

    def create_segment(self, name: str, size_bytes: int) -> SegmentFile:
        """Create a file of `size_bytes`, to be filled by several threads; it must not exist.

        Like small files it need not be durable before the commit.
        """

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file; it need not be durable before the commit."""

    def link(self, name: str, checkpoint: str, file: str, committed: FileEntry) -> str | None:
        """Make `name` hold the bytes of a file of a committed checkpoint of the same store, unwritten.

        Args:
            name: of the file to be.
            checkpoint: its name, as "checkpoint_3".
            file: its name there.
            committed: what the manifest there must say of it.

        Returns:
            What the manifest has to say in `FileEntry.within`; None if the place needs no such word.

        Raises:
            FileNotFoundError: it is gone, or that name belongs to another checkpoint by now.
            OSError: the place refuses; nothing of it is left, and it can be written instead.
        """

    def adopt(self, name: str, path: Path) -> None:
        """Make `name` hold a durable file of the disk that nobody writes to any more, linked if possible."""

    def commit(self, manifest: bytes) -> None:
        """Make everything durable, then publish the checkpoint in one step."""

    def discard(self) -> None:
        """Remove what was written. Never raises: the error that led here is the one that counts."""


class HostWorkspace(Workspace, Protocol):
    """The workspace of one process, into which others may write as well; it alone commits."""

    def invitation(self) -> str:
        """What `GuestWorkspace.accept` needs; to be asked for after `open`."""

    def take_over(self, files: Mapping[str, FileEntry]) -> None:
        """Others have made these files; they are to be committed.

        Raises:
            FileNotFoundError: what they linked is gone.
        """


class GuestWorkspace(Workspace, Protocol):
    """What another process adds to a `HostWorkspace`; `commit` is the host's."""

    def accept(self, invitation: str) -> None:
        """Learn what it is a part of; called first."""

    def leave(self) -> None:
        """The host has committed: from now on `discard` removes nothing."""


class Backend(Protocol):
    """Where the checkpoints of one run live. `str()` says where that is."""

    @property
    def scan_threads(self) -> int:
        """How many manifests to read at once."""

    def checkpoints(self) -> Sequence[tuple[int, Place]]:
        """Every committed checkpoint, whatever its health, by rising number.

        Raises:
            CheckpointNotFoundError: the place is something that can't hold checkpoints.
        """

    def set_aside_before(self) -> Sequence[tuple[int, Place]]:
        """The damaged checkpoints that were moved out of the way, by rising number."""

    def next_number(self) -> int:
        """A number larger than any that this place has seen, those set aside included."""

    def free_bytes(self) -> int | None:
        """How many more bytes fit; None if there is no telling."""

    def explained(self, place: Place | None = None, doing: str = "saving") -> AbstractContextManager[None]:
        """Turn the place's refusals within a block into keepstep's errors; `doing`: what is under way."""

    def claim(self) -> None:
        """Become the one process that writes here, and clear what dead ones left.

        Raises:
            StoreBusyError: another process writes here.
            StoreError: the place refuses.
        """

    def reserve(self) -> HostWorkspace:
        """A workspace under the next free number, which nobody else is given until `release`."""

    def guest(self) -> GuestWorkspace:
        """A part of a workspace that another process reserved at the same place."""

    def release(self, workspace: Workspace) -> None:
        """The save is over, whatever became of it."""

    def holds(self, place: Place) -> bool:
        """Whether a checkpoint lies here, and not in another store."""

    def delete(self, place: Place) -> None:
        """Delete a checkpoint: out of sight in one step, then its files; those that others name stay.

        Raises:
            StoreError: the place refuses. Its cause is FileNotFoundError if somebody else deleted it first.
        """

    def set_aside(self, place: Place) -> Place:
        """Move a damaged checkpoint out of the way; nothing is deleted, its number is never used again.

        Returns:
            Where it lies now.

        Raises:
            OSError, StoreError: the place refuses; it is where it was.
        """
