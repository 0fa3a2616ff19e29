"""What a store consists of, made from its arguments: checked once, made anew in a process that was forked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keepstep.checkpoint.engine import Engine, make_engine
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.mirror import Mirror
from keepstep.checkpoint.place.backend import Backend
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.place.registry import is_address, open_bucket
from keepstep.checkpoint.upkeep import Bystander, Upkeep
from keepstep.errors import UsageError
from keepstep.files import Files
from keepstep.world import World

__all__ = ["Blueprint", "Parts", "root_of"]


def root_of(path: str | os.PathLike[str]) -> Path | str:
    """The directory of a store, absolute since a program may change its own between two saves; or an address.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(path, str | os.PathLike) or os.fspath(path) == "" or "\0" in os.fspath(path):
        raise UsageError(f"the path of a store is {path!r}; expected a directory, or the address of a bucket")
    return os.fspath(path) if is_address(path) else Path(path).absolute()


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What belongs to one process.

    Attributes:
        backend: the place.
        engine: what makes a save.
        upkeep: what keeps the place in order.
        mirror: the copy in a bucket; None: there is none, or another rank sees to it.
    """

    backend: Backend
    engine: Engine
    upkeep: Upkeep
    mirror: Mirror | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """The arguments of a `Store`; see there.

    Raises:
        UsageError: they don't go together.
    """

    root: Path | str
    storage_options: Mapping[str, Any] | None = field(repr=False)  # it may hold a secret
    mirror: str | None
    mirror_retention: Retention | None
    mirror_pending: int
    retention: Retention
    spare_other_runs: bool
    memory_budget_bytes: int
    scrub_interval_s: float | None
    scrub_bytes_per_s: float | None
    files: Files
    world: World

    def __post_init__(self) -> None:
        if self.mirror is not None and not (isinstance(self.root, Path) and is_address(self.mirror)):
            raise UsageError(
                f"mirror is {self.mirror!r} of {self.root}; expected the address of a bucket, for copies of "
                "what is saved to a directory"
            )
        given: object
        for name, given in (("retention", self.retention), ("mirror_retention", self.mirror_retention)):
            if given is not None and not isinstance(given, Retention):
                raise UsageError(f"{name} is {given!r:.100}; expected a Retention, as Retention(keep_last=3)")
        pending: object = self.mirror_pending
        if isinstance(pending, bool) or not isinstance(pending, int) or pending < 1:
            raise UsageError(f"mirror_pending is {pending!r}; expected a whole number of at least 1")
        if not hasattr(self.world, "rank"):
            raise UsageError(
                f"world is {self.world!r:.100}; expected the ranks that save together, as "
                "keepstep.world.Ranks(), or None for one process"
            )

    def make(self) -> Parts:
        """Make them; nothing is connected to, read or written yet."""
        backend = self._backend()
        kind = Bystander if self.world.rank else Upkeep
        upkeep = kind(
            backend, scrub_interval_s=self.scrub_interval_s, scrub_bytes_per_s=self.scrub_bytes_per_s
        )
        return Parts(
            backend=backend,
            engine=make_engine(self.memory_budget_bytes, self.world, str(self.root), backend.guest),
            upkeep=upkeep,
            mirror=self._mirror(backend, upkeep),
        )

    def _backend(self) -> Backend:
        if isinstance(self.root, Path):
            return LocalBackend(self.files, self.root)
        return open_bucket(os.fspath(self.root), self.storage_options)

    def _mirror(self, backend: Backend, upkeep: Upkeep) -> Mirror | None:
        if self.mirror is None or self.world.rank or not isinstance(backend, LocalBackend):
            return None
        return Mirror(
            backend.path,
            open_bucket(self.mirror, self.storage_options),
            files=self.files,
            retention=self.mirror_retention if self.mirror_retention is not None else self.retention,
            most_pending=self.mirror_pending,
            reached=backend.raise_floor,
            damaged=upkeep.note_damage,
        )
