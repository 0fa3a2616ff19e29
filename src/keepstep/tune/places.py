"""Where the checkpoints of one trial lie: a directory, or a place in a bucket. No torch.

The trial's process writes there, the driver deletes. What keeps them apart is the order of events: the driver
deletes nothing that a running trial may link to, which is the newest checkpoint alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from keepstep.checkpoint.format.manifest import MANIFEST_NAME
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.place.backend import INTERNAL_NAME, HostWorkspace
from keepstep.checkpoint.place.deletion import delete_checkpoint, empty_trash, is_ours
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.place.local import LocalWorkspace, explained, sweep
from keepstep.checkpoint.place.registry import is_address, open_bucket
from keepstep.errors import CheckpointBusyError
from keepstep.files import Files, LocalFiles

if TYPE_CHECKING:
    from keepstep.checkpoint.place.bucket import BucketBackend

__all__ = ["TrialPlace", "open_place"]


class TrialPlace(Protocol):
    """The checkpoints of one trial."""

    def at(self, name: str) -> Place:
        """The checkpoint of that name, there or not."""

    def workspace(self, name: str) -> HostWorkspace:
        """A new checkpoint of that name; what lies there already is replaced."""

    def names(self) -> list[str]:
        """Those that are committed."""

    def delete(self, name: str) -> bool:
        """Delete one, there or not; False if it is being read, and has to be deleted later."""

    def sweep(self) -> None:
        """Remove what a process that died left unfinished; no process writes here now."""


def open_place(path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> TrialPlace:
    """The place at an address; a directory need not be there.

    Raises:
        UsageError: it is no address that keepstep knows.
    """
    if is_address(path):
        return _InBucket(open_bucket(os.fspath(path), storage_options))
    return _InDirectory(LocalFiles(), Path(path))


class _InDirectory:
    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._backend = LocalBackend(files, path)

    @property
    def _trash(self) -> Path:
        return self._path / INTERNAL_NAME / "trash"

    def at(self, name: str) -> Path:
        return self._path / name

    def workspace(self, name: str) -> HostWorkspace:
        final = self._path / name
        if os.path.lexists(final / MANIFEST_NAME) and not is_ours(final):
            self._backend.set_aside(final)  # nobody knows any more what it was
        return LocalWorkspace(self._files, final)

    def names(self) -> list[str]:
        found = [place for _, place in self._backend.checkpoints() if isinstance(place, Path)]
        return [place.name for place in found if os.path.lexists(place / MANIFEST_NAME)]

    def delete(self, name: str) -> bool:
        directory = self._path / name
        if not directory.is_dir():
            return True
        with explained(directory, "deleting"):
            try:
                delete_checkpoint(self._files, directory, self._trash)
            except CheckpointBusyError:
                return False
            except FileNotFoundError:  # somebody else was faster
                return True
        return True

    def sweep(self) -> None:
        if self._path.is_dir():
            with explained(self._path, "sweeping"):
                sweep(self._files, self._path)
                empty_trash(self._files, self._trash)


class _InBucket:
    def __init__(self, bucket: BucketBackend) -> None:
        self._bucket = bucket

    def at(self, name: str) -> Place:
        return self._bucket.at(name)

    def workspace(self, name: str) -> HostWorkspace:
        return self._bucket.reserve_in_place_of(name)

    def names(self) -> list[str]:
        return [place.name for _, place in self._bucket.checkpoints()]

    def delete(self, name: str) -> bool:
        self._bucket.delete_unclaimed(self._bucket.at(name))
        return True

    def sweep(self) -> None:
        committed = set(self.names())
        for name in self._bucket.names_begun():
            if name not in committed:
                self._bucket.delete_unclaimed(self._bucket.at(name))
