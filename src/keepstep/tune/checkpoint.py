"""`Checkpoint`: what a trial reports, and goes on from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["Checkpoint"]


class Checkpoint:
    """A directory that a trial hands over or gets back: one of its own, or a committed checkpoint.

    Args:
        path: a directory, or the address of a committed checkpoint in a bucket.
        storage_options: for a bucket.

    Attributes:
        path: the directory with the user's files; in a bucket its address.
        address: the committed checkpoint's directory or address; None if it was not committed yet.
    """

    path: str
    address: str | None

    def __init__(
        self, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        raise NotImplementedError(path, storage_options)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """What lies in a directory."""
        return cls(path)

    @property
    def filesystem(self) -> None:
        """Always None; a script written for Ray Tune may ask."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What it was reported with; {} before."""
        raise NotImplementedError

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        """Its files in a directory on this machine, for the time of a block; don't write there."""
        yield self.path

    def to_directory(self, path: str | os.PathLike[str] | None = None) -> str:
        """Copy its files to a directory, by default a new temporary one; return its path."""
        raise NotImplementedError(path)

    def get_metadata(self) -> dict[str, Any]:
        """What was set."""
        raise NotImplementedError

    def set_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Have it be this from now on; written down when the checkpoint is reported."""
        raise NotImplementedError(metadata)

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Add to it."""
        raise NotImplementedError(metadata)

    def load(self, only: str | Sequence[str] | None = None) -> Any:
        """The state that was saved as a tree; as `keepstep.Checkpoint.load`."""
        raise NotImplementedError(only)

    def load_into(self, objects: Any, only: str | Sequence[str] | None = None) -> None:
        """Restore live objects; as `keepstep.Checkpoint.load_into`."""
        raise NotImplementedError(objects, only)
