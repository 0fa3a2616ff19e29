"""`Checkpoint`: what a trial reports, and goes on from. No torch, unless a state is loaded."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from keepstep.checkpoint.format.names import HANDED_OVER, is_handed_over
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.place.deletion import reading
from keepstep.checkpoint.place.registry import is_address, open_bucket
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, UsageError
from keepstep.tune.fetching import fetch_checkpoint, fetch_handed_over

__all__ = ["METADATA", "REPORTED_AS", "Checkpoint"]

METADATA: Final = "metadata"
"""Where a manifest's environment holds what `set_metadata` set."""

REPORTED_AS: Final = "reported_as"
"""Where it says what a checkpoint was reported as: "directory" or "state"."""

_WITH_TORCH: Final = "keepstep.checkpoint.version"


class Checkpoint:
    """A directory that a trial hands over or gets back: one of its own, or a committed checkpoint.

    Args:
        path: a directory, the directory of a committed checkpoint or its `files/`, or the address of a
            committed checkpoint in a bucket.
        filesystem: as Ray Tune has it; an address says it all, so only None is allowed.
        storage_options: for a bucket.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        UsageError: a `filesystem` was given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        filesystem: None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if filesystem is not None:
            raise UsageError(
                f"filesystem is {filesystem!r}; give the address instead, as s3://bucket/run/checkpoint_3, "
                "with storage_options if it needs any"
            )
        self._given = os.fspath(path).rstrip("/") if is_address(path) else str(Path(path).absolute())
        self._options = storage_options
        self._metadata: dict[str, Any] | None = None
        if not is_address(path):
            _check_directory(Path(self._given))

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """What lies in a directory. It must stay as it is until the call that reports it has returned.

        Raises:
            CheckpointNotFoundError: there is no such directory.
        """
        return cls(path)

    def __repr__(self) -> str:
        return f"Checkpoint(path={self.path!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checkpoint) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._given, self._options, self._metadata)

    # ------------------------------------------------------------------------------------ where

    @functools.cached_property
    def _place(self) -> Place | None:
        """The committed checkpoint; None if it is a directory of the user's."""
        if is_address(self._given):
            store, _, name = self._given.removesuffix(f"/{HANDED_OVER}").rpartition("/")
            return open_bucket(store, self._options).at(name)
        directory = Path(self._given)
        inside = directory.parent if directory.name == HANDED_OVER else None
        for place in (directory, *([inside] if inside else [])):
            if _is_checkpoint(place) and (place == directory or _holds_files(read_manifest(place))):
                return place
        return None

    @functools.cached_property
    def _manifest(self) -> Manifest | None:
        place = self._place
        if place is None:
            return None
        if not isinstance(place, Path) and not place.exists():
            raise CheckpointNotFoundError(f"there is no checkpoint at {place}: it was deleted, or never was")
        return read_manifest(place)

    @property
    def address(self) -> str | None:
        """The directory or address of the committed checkpoint; None if it was not committed yet."""
        return None if self._place is None else str(self._place)

    @property
    def path(self) -> str:
        """The directory with its files; in a bucket the address that they lie below."""
        if self._place is None or self._manifest is None:
            return self._given
        return f"{self._place}/{HANDED_OVER}" if _holds_files(self._manifest) else str(self._place)

    @property
    def filesystem(self) -> None:
        """Always None: `path` says it all. A script written for Ray Tune may ask."""

    # ------------------------------------------------------------------------------------ files

    @contextmanager
    def as_directory(self, *, verify: bool = True) -> Iterator[str]:
        """Its files in a directory on this machine, for the time of a block; don't write there.

        A checkpoint on this machine is used where it lies, and isn't deleted meanwhile; one in a bucket is
        copied to a temporary directory.

        Args:
            verify: read a committed checkpoint first and see that every byte is what was committed.

        Raises:
            CheckpointNotFoundError: it is gone.
            DamagedCheckpointError: it is not what was committed.
        """
        place, manifest = self._place, self._manifest
        if manifest is not None and not isinstance(place, Path | None):
            with tempfile.TemporaryDirectory(prefix="keepstep-checkpoint-") as directory:
                self._fetch(place, manifest, Path(directory))
                yield directory
            return
        directory = str(place or self._given)
        with reading(Path(directory)):
            _check_directory(Path(self.path))
            if isinstance(place, Path) and verify:
                _check_content(place)
            yield self.path

    def to_directory(self, path: str | os.PathLike[str] | None = None) -> str:
        """Copy its files to a directory, by default a new temporary one; what lies there already stays.

        Returns:
            The directory.

        Raises:
            CheckpointNotFoundError: it is gone.
            DamagedCheckpointError: it is not what was committed.
        """
        target = tempfile.mkdtemp(prefix="keepstep-checkpoint-") if path is None else os.fspath(path)
        place, manifest = self._place, self._manifest
        if manifest is not None and not isinstance(place, Path | None):
            Path(target).mkdir(parents=True, exist_ok=True)
            self._fetch(place, manifest, Path(target))
            return target
        with self.as_directory() as source:
            shutil.copytree(source, target, dirs_exist_ok=True)
        return target

    @contextmanager
    def as_source(self) -> Iterator[Path]:
        """What a new checkpoint is to be made of: its directory, for a committed one with its manifest."""
        place, manifest = self._place, self._manifest
        if manifest is not None and not isinstance(place, Path | None):
            with tempfile.TemporaryDirectory(prefix="keepstep-checkpoint-") as directory:
                fetch_checkpoint(place, manifest, Path(directory))
                yield Path(directory)
        else:
            yield place if isinstance(place, Path) else Path(self._given)

    def _fetch(self, place: Place, manifest: Manifest, target: Path) -> None:
        fetch = fetch_handed_over if _holds_files(manifest) else fetch_checkpoint
        fetch(place, manifest, target)

    # --------------------------------------------------------------------------- what is said of it

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What it was reported with, nested names joined by "/"; {} before."""
        return {} if self._manifest is None else self._manifest.metrics

    def get_metadata(self) -> dict[str, Any]:
        """What was set: on this object, or when it was reported."""
        if self._metadata is None:
            kept = self._manifest.environment.get(METADATA) if self._manifest is not None else None
            return copy.deepcopy(kept) if isinstance(kept, dict) else {}
        return copy.deepcopy(self._metadata)

    def set_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Have it be this from now on.

        It is written down when the checkpoint is reported. A committed checkpoint never changes: there it
        holds for this object alone.

        Args:
            metadata: names with what JSON can hold.
        """
        self._metadata = copy.deepcopy(dict(metadata))

    def update_metadata(self, metadata: Mapping[str, Any]) -> None:
        """Add to it, or replace some of it; as `set_metadata`."""
        self.set_metadata({**self.get_metadata(), **metadata})

    # ------------------------------------------------------------------------------------ states

    @property
    def is_state(self) -> bool:
        """Whether it was reported as a state, or as a `keepstep.Checkpoint`, and not as a directory."""
        return self._manifest is not None and self._manifest.environment.get(REPORTED_AS) == "state"

    def load(self, only: str | Sequence[str] | None = None) -> Any:
        """The state that was reported as a tree; as `keepstep.Checkpoint.load`.

        Raises:
            UsageError: it is a directory, and holds no state.
        """
        return self._committed().load(only)

    def load_into(self, objects: Any, only: str | Sequence[str] | None = None) -> None:
        """Restore live objects from a state; as `keepstep.Checkpoint.load_into`.

        Raises:
            UsageError: it is a directory, and holds no state.
        """
        self._committed().load_into(objects, only)

    def _committed(self) -> Any:
        if self._place is None or self._manifest is None:
            raise UsageError(
                f"{self._given} is a directory and holds no state; open its files with "
                "checkpoint.as_directory()"
            )
        return import_module(_WITH_TORCH).Checkpoint(self._place, self._manifest)


def _again(path: str, options: Mapping[str, Any] | None, metadata: dict[str, Any] | None) -> Checkpoint:
    """The same checkpoint in another process; it need not be there (any more)."""
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint._given, checkpoint._options, checkpoint._metadata = path, options, metadata
    return checkpoint


def _check_directory(directory: Path) -> None:
    if not directory.is_dir():
        what = "is a file" if os.path.lexists(directory) else "does not exist"
        raise CheckpointNotFoundError(
            f"{directory} {what}; a checkpoint is a directory that holds files, and is there until the call "
            "that reports it has returned"
        )


def _is_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint of keepstep's; a manifest.json may be somebody else's.

    Raises:
        DamagedCheckpointError: it is one, with a damaged manifest.
    """
    try:
        read_manifest(directory)
    except DamagedCheckpointError:
        manifest = directory / MANIFEST_NAME
        if manifest.is_file() and b'"format": "keepstep"' in manifest.read_bytes()[:200]:
            raise
        return False
    return True


def _holds_files(manifest: Manifest) -> bool:
    return bool(manifest.directories) or any(map(is_handed_over, manifest.files))


def _check_content(directory: Path) -> None:
    report = verify_checkpoint(directory)
    if not report.sound:
        raise DamagedCheckpointError(directory, "; ".join(report.problems))
