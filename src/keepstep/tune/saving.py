"""`Saver`: commits what a trial's process saves, as checkpoints of the trial's directory.

torch is imported when the first state is saved, and not before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple

from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.place.registry import is_address
from keepstep.checkpoint.saving.copying import Copier
from keepstep.checkpoint.saving.description import Description, Lineage, describe
from keepstep.checkpoint.saving.handed_over import Committed, save_handed_over
from keepstep.errors import DamagedCheckpointError, DirectoryNotSavableError, UsageError
from keepstep.tune.checkpoint import METADATA, REPORTED_AS, Checkpoint
from keepstep.tune.places import open_place

__all__ = ["Saved", "Saver", "checkpoint_dirname"]

_WITH_TORCH: Final = "keepstep.tune.state_saving"


def checkpoint_dirname(number: int) -> str:
    """The name of a trial's checkpoint: "checkpoint_000003"."""
    return f"checkpoint_{number:06d}"


class Saved(NamedTuple):
    """A checkpoint that was committed: its name in the trial's directory, and the bytes of its files."""

    name: str
    bytes: int


class Saver:
    """Saves the checkpoints of one start of a trial, one after another.

    What did not change since the checkpoint before is linked to it.

    Args:
        path: the address of the trial's directory.
        storage_options: for a bucket.
        lineage: the id of the run that they belong to.
        next_checkpoint: the number of the first. What lies there already was never reported, and is replaced.
        resumed_from: the address of the checkpoint that the trial goes on from.
    """

    def __init__(
        self,
        path: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
        lineage: str = "",
        next_checkpoint: int = 0,
        resumed_from: str | None = None,
    ) -> None:
        self._path = path
        self._place = open_place(path, storage_options)
        self._options = storage_options
        self._lineage = lineage
        self._number = next_checkpoint
        self._resumed_from = resumed_from
        self._previous: Committed | None = None
        self._parent: str | None = None
        self._copier = Copier()
        self._states: Any = None

    def save(self, what: Any, *, iteration: int, metrics: Mapping[str, Any]) -> Saved:
        """Commit a checkpoint; it is durable on return.

        Args:
            what: a `tune.Checkpoint`, a `keepstep.Checkpoint`, or a state as `keepstep.Store.save` takes it.
            iteration: `training_iteration` of the result that it belongs to; its step.
            metrics: of that result; nested ones are kept by "a/b", and what is no number, string or boolean
                is left out.

        Raises:
            CheckpointNotFoundError: a directory that is not there.
            UsageError: a path, which is neither a checkpoint nor a state.
            StateError: a state or a directory that can't be saved as it is; nothing was committed.
            StoreError: the place refuses; nothing was committed.
        """
        source = _source_of(what)
        self._begin()
        name = checkpoint_dirname(self._number)
        lineage = Lineage(run=self._lineage, parent=self._parent)
        environment: dict[str, Any] = {
            REPORTED_AS: "directory" if isinstance(what, Checkpoint) and not what.is_state else "state"
        }
        if isinstance(what, Checkpoint) and (metadata := what.get_metadata()):
            environment[METADATA] = metadata
        said = describe(
            step=iteration,
            epoch=None,
            metrics=_plain(metrics),
            tags=(),
            pinned=False,
            environment=environment,
        )
        if source is None:
            manifest = self._save_state(name, what, said, lineage)
        else:
            manifest = self._save_directory(name, source, said, lineage)
        self._previous, self._parent = Committed(place=self._place.at(name), manifest=manifest), manifest.id
        self._number += 1
        return Saved(name, manifest.bytes)

    def _begin(self) -> None:
        """Learn from the checkpoint that the trial goes on from, once."""
        address, self._resumed_from = self._resumed_from, None
        if address is None:
            return
        home, _, name = address.rstrip("/").rpartition("/")
        try:
            place = open_place(home, self._options).at(name)
            manifest = read_manifest(place)
        except DamagedCheckpointError:
            return  # it is gone, or damaged: then nothing is linked to it
        self._parent = manifest.id
        if home == os.fspath(self._path).rstrip("/"):
            self._previous = Committed(place=place, manifest=manifest)

    def _save_directory(
        self, name: str, source: AbstractContextManager[Path], said: Description, lineage: Lineage
    ) -> Manifest:
        with source as directory:
            self._check_apart(directory)
            return save_handed_over(
                self._place.workspace(name),
                directory,
                said,
                lineage,
                copier=self._copier,
                previous=self._previous,
            )

    def _check_apart(self, directory: Path) -> None:
        if is_address(self._path) or not Path(self._path).resolve().is_relative_to(directory.resolve()):
            return
        raise DirectoryNotSavableError(
            f"{directory} can't be a checkpoint of this trial: the trial's own directory, {self._path}, with "
            "all checkpoints lies in it. Write the files to a directory of their own, as a temporary one; "
            "nothing was committed"
        )

    def _save_state(self, name: str, state: Any, said: Description, lineage: Lineage) -> Manifest:
        if self._states is None:
            self._states = import_module(_WITH_TORCH).StateSaver()
            if self._previous is not None:
                self._states.follow(self._previous.place, self._previous.manifest)
        manifest: Manifest = self._states.save(lambda: self._place.workspace(name), state, said, lineage)
        return manifest


def _source_of(what: Any) -> AbstractContextManager[Path] | None:
    """The directory to make a checkpoint of; None: `what` is a state."""
    if isinstance(what, str | bytes | os.PathLike):
        raise UsageError(
            f"checkpoint is {what!r:.200} ({type(what).__name__}), which is no checkpoint; one "
            "is made of a directory by tune.Checkpoint.from_directory(...)"
        )
    if isinstance(what, Checkpoint):
        return what.as_source()
    if isinstance(getattr(what, "manifest", None), Manifest):  # a keepstep.Checkpoint, which needs torch
        place: Place = what.place
        return nullcontext(place) if isinstance(place, Path) else Checkpoint(str(place)).as_source()
    return None


def _plain(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            plain |= _plain(value, f"{prefix}{name}/")
        elif isinstance(value, float | int | str | bool):
            plain[f"{prefix}{name}"] = value
    return plain
