"""A committed checkpoint: what was said of it, and what it loads."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, Manifest, TensorEntry
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.keeping.verify import Report, verify_checkpoint
from keepstep.checkpoint.loading.reader import Reader
from keepstep.checkpoint.loading.restore import load_into, load_own, load_tree
from keepstep.checkpoint.place.deletion import reading
from keepstep.checkpoint.place.local import replaced_path
from keepstep.checkpoint.place.registry import is_address, open_bucket
from keepstep.errors import CheckpointNotFoundError, UsageError

__all__ = ["Checkpoint"]

log = logging.getLogger(__name__)


class Checkpoint:
    """A committed checkpoint. Cheap to make: only the manifest was read.

    Attributes:
        place: where it lies: its directory, or an address in a bucket; `str()` shows either.
        manifest: what was said of it and what it consists of.
    """

    def __init__(self, place: Place, manifest: Manifest) -> None:
        self.place = place
        self.manifest = manifest

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
    ) -> Checkpoint:
        """The checkpoint in a directory, or at an address in a bucket.

        Args:
            path: where it lies.
            storage_options: of a bucket, see `Store`.

        Raises:
            CheckpointNotFoundError: there is no such directory, or no manifest in it.
            ManifestError: the manifest is damaged.
        """
        if is_address(path):
            return cls._in_bucket(os.fspath(path).rstrip("/"), storage_options)
        directory = Path(path).absolute()  # a program may change its own before it loads
        if not directory.exists() and replaced_path(directory).exists():
            directory = replaced_path(directory)
            log.warning("%s is missing: a save was cut off while replacing it; using %s", path, directory)
        if not directory.is_dir():
            raise CheckpointNotFoundError(f"there is no checkpoint at {directory}: no such directory")
        if not os.path.lexists(directory / MANIFEST_NAME):
            raise CheckpointNotFoundError(
                f"{directory} is not a keepstep checkpoint: it has no manifest.json. Give the directory of "
                "one checkpoint, as .../checkpoints/checkpoint_12"
            )
        return cls(directory, read_manifest(directory))

    @classmethod
    def _in_bucket(cls, address: str, options: Mapping[str, Any] | None) -> Checkpoint:
        store, _, name = address.rpartition("/")
        source = open_bucket(store, options).at(name)
        if not source.exists():
            raise CheckpointNotFoundError(
                f"there is no checkpoint at {address}; give the address of one, as s3://bucket/run/checkpoint_12"
            )
        return cls(source, read_manifest(source))

    @property
    def path(self) -> Path:
        """Its directory.

        Raises:
            UsageError: it lies in a bucket; `place` says where.
        """
        if not isinstance(self.place, Path):
            raise UsageError(
                f"{self.place} is in a bucket and has no path; str(checkpoint.place) is its address"
            )
        return self.place

    @property
    def name(self) -> str:
        """Its name, as "checkpoint_12"."""
        return source_of(self.place).name

    @property
    def step(self) -> int | None:
        """Optimizer steps done when it was saved."""
        return self.manifest.step

    @property
    def epoch(self) -> int | None:
        """The epoch under way when it was saved, from 0."""
        return self.manifest.epoch

    @property
    def metrics(self) -> Mapping[str, float | int | str | bool]:
        """Metrics given at the save."""
        return self.manifest.metrics

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags given at the save."""
        return self.manifest.tags

    @property
    def pinned(self) -> bool:
        """Whether retention may never drop it."""
        return self.manifest.pinned

    @property
    def created_at(self) -> str:
        """When it was committed, ISO 8601, UTC."""
        return self.manifest.created_at

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return self.manifest.bytes

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Where each tensor lies, by address; read from state.json at each call.

        Raises:
            DamagedCheckpointError: it can't be read.
        """
        return self.reader().tensors

    def __repr__(self) -> str:
        said = {"step": self.step, "epoch": self.epoch, **self.metrics}
        shown = ", ".join(f"{name}={value!r}" for name, value in said.items() if value is not None)
        return f"<Checkpoint {self.place} {shown}>"

    def load(self, only: str | Sequence[str] | None = None, *, verify: bool = True) -> Any:
        """The saved state as new objects: dicts, lists, arrays, CPU tensors.

        Live objects come back as their state dicts. Tensors are a private mapping of the files: a page
        is read when it is touched, a write stays in memory.

        Args:
            only: addresses or shell globs over addresses to load ("model", "model/h.0.*"); the rest is
                neither read nor returned.
            verify: hash what is loaded first. Without it a flipped bit goes unnoticed.

        Raises:
            CheckpointNotFoundError: it was deleted or replaced meanwhile.
            DamagedCheckpointError: in one of its kinds, naming file and tensor.
            UsageError: `only` matches nothing.
            UnsupportedTypeError: a value's codec is not registered.
        """
        with self._held():
            return load_tree(self.reader(), only=_patterns(only), verify=verify)

    def load_per_rank(self, rank: int = 0) -> Any:
        """What rank `rank` saved as its own (`per_rank`), as new objects; None if there is nothing of it.

        Raises:
            DamagedCheckpointError, CheckpointNotFoundError: as for `load`.
        """
        with self._held():
            return load_own(self.reader(), rank)

    def load_into(
        self,
        objects: Any,
        only: str | Sequence[str] | None = None,
        *,
        per_rank: Any = None,
        rank: int = 0,
        agree: Callable[[], object] | None = None,
    ) -> None:
        """Restore live objects in place: all of it or nothing.

        Args:
            objects: nested like the state that was saved. Modules, optimizers, tensors and arrays take
                their values in place; other objects with `load_state_dict` are handed their state; dicts
                and lists take plain values in place.
            only: restore only what matches; `objects` then holds only that.
            per_rank: live objects that take what rank `rank` saved as its own. If so many ranks did not
                save, they stay as they are, and a warning says so.
            rank: which one this is.
            agree: of ranks that restore together: called when everything fits and objects have taken their
                state, before anything is overwritten, as `meeting.exchange(b"")`. If it raises, objects are
                given their earlier state back, nothing else was changed, and its error is raised.

        Raises:
            MismatchError: something does not fit; all differences are named and nothing was changed.
            RestoreError: an object's own `load_state_dict` raised; objects handed their state before it
                were given their earlier state back.
            DamagedCheckpointError: damage was met while reading; `overwritten` names what had been
                overwritten by then. Load another checkpoint into the same objects before going on.
        """
        with self._held():
            load_into(self.reader(), objects, only=_patterns(only), own=per_rank, rank=rank, agree=agree)

    def _held(self) -> contextlib.AbstractContextManager[None]:
        """Hold off its deletion, where a place can."""
        return reading(self.place) if isinstance(self.place, Path) else contextlib.nullcontext()

    def reader(self) -> Reader:
        """What lies at the path, if it is still this checkpoint."""
        if not source_of(self.place).exists():
            raise CheckpointNotFoundError(
                f"{self.place} is gone: it was deleted, or dropped by the store's retention. Pin or tag a "
                "checkpoint that has to stay"
            )
        reader = Reader(self.place)
        if reader.manifest.id != self.manifest.id:
            raise CheckpointNotFoundError(
                f"{self.place} holds another checkpoint by now (step {reader.manifest.step}, this one was of "
                f"step {self.step}): it was replaced. Open the path again to load the new one"
            )
        return reader

    def verify(self, *, quick: bool = False) -> Report:
        """Whether every byte is what was committed; see `keepstep.checkpoint.keeping.verify`."""
        return verify_checkpoint(self.place, quick=quick)


def _patterns(only: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if only is None:
        return None
    patterns = (only,) if isinstance(only, str) else only
    if not (isinstance(patterns, Collection) and all(isinstance(pattern, str) for pattern in patterns)):
        raise UsageError(f'only is {only!r:.100}; expected an address or several, as "model" or ["model"]')
    return tuple(patterns)
