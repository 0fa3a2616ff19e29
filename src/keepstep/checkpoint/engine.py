"""What every save needs, whether it goes into a store or into a directory of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from keepstep.checkpoint.format.manifest import Manifest, TensorEntry
from keepstep.checkpoint.place.backend import GuestWorkspace, HostWorkspace
from keepstep.checkpoint.place.joined import JoinedWorkspace
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.checkpoint.place.registry import is_address
from keepstep.checkpoint.saving.description import Description, Lineage, describe
from keepstep.checkpoint.saving.planner import Planner
from keepstep.checkpoint.saving.rank_planner import RankPlanner
from keepstep.checkpoint.saving.save import Save
from keepstep.checkpoint.saving.shared import SharedSave
from keepstep.checkpoint.saving.staging import BlockPool
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import UsageError
from keepstep.files import Files, LocalFiles
from keepstep.meetings import Turns
from keepstep.world import OneRank, World

__all__ = ["Engine", "Order", "make_engine", "save_directory"]

_MEMORY_BYTES: Final = 64 << 20
"""For staging a directory of its own, which is not kept for another save."""

_TO_A_DIRECTORY: Final = "saving to a directory of its own"
"""What ranks meet over, whichever directory it is: a run may save to thousands."""

_of_ranks = Turns()
"""To save to directories; one after the other, as they meet over one topic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is to be saved.

    Attributes:
        state: nested as `Store.save` takes it.
        description: what the user says of it.
        lineage: which run writes it, and after which checkpoint.
        own: what is this rank's own; None: nothing.
    """

    state: Any
    description: Description
    lineage: Lineage
    own: Any = None


class Engine:
    """Reusable memory of a writer, and what it knows of the save before."""

    def __init__(self, memory_budget_bytes: int) -> None:
        self.pool = BlockPool(memory_budget_bytes)
        self._planner = Planner()

    def follow(self, checkpoint: str, manifest: Manifest, tensors: Mapping[str, TensorEntry]) -> None:
        """Go on from a checkpoint of the same place that was loaded and verified.

        Args:
            checkpoint: its name.
            manifest: of it.
            tensors: its index.
        """
        self._planner.adopt(checkpoint, manifest.files, tensors)

    def forget(self) -> None:
        """Link nothing to what was committed so far: it may be damaged."""
        self._planner.forget()

    def save(self, reserve: Callable[[], HostWorkspace], order: Order) -> Save:
        """A save that has decided what goes where."""
        return Save(
            workspace=reserve(),
            planner=self._planner,
            state=order.state,
            description=order.description,
            lineage=order.lineage,
            pool=self.pool,
            own=order.own,
        )


class _SharedEngine(Engine):
    """The engine of one of many ranks, which save together.

    Args:
        memory_budget_bytes: most host memory for staging.
        world: the ranks.
        place: what is saved to; the same on all ranks.
        topic: what they meet over.
        guest: what ranks write into that did not make it.
    """

    def __init__(
        self,
        memory_budget_bytes: int,
        world: World,
        place: str,
        topic: str,
        guest: Callable[[], GuestWorkspace],
    ) -> None:
        super().__init__(memory_budget_bytes)
        self._guest = guest
        self._world = world
        self._place = place
        self._topic = topic
        self._ranks = RankPlanner(world.size)

    def follow(self, checkpoint: str, manifest: Manifest, tensors: Mapping[str, TensorEntry]) -> None:
        self._ranks.adopt(checkpoint, manifest, tensors)

    def forget(self) -> None:
        self._ranks.forget()

    def save(self, reserve: Callable[[], HostWorkspace], order: Order) -> Save:
        return SharedSave(
            world=self._world,
            place=self._place,
            topic=self._topic,
            reserve=reserve,
            guest=self._guest,
            ranks=self._ranks,
            state=order.state,
            own=order.own,
            description=order.description,
            lineage=order.lineage,
            pool=self.pool,
        )


def make_engine(
    memory_budget_bytes: int,
    world: World,
    place: str,
    guest: Callable[[], GuestWorkspace],
    *,
    topic: str | None = None,
) -> Engine:
    """The engine that fits the number of ranks.

    Args:
        memory_budget_bytes: most host memory for staging.
        world: the ranks.
        place: what is saved to; the same on all ranks.
        guest: a workspace there that another rank has made.
        topic: what the ranks meet over, which keeps a connection of each for good; None: saving there.
    """
    if world.size > 1:
        return _SharedEngine(memory_budget_bytes, world, place, topic or f"saving to {place}", guest)
    return Engine(memory_budget_bytes)


def save_directory(
    directory: str | os.PathLike[str],
    state: Any,
    *,
    step: int | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    tags: Sequence[str] = (),
    pinned: bool = False,
    environment: Mapping[str, Any] | None = None,
    per_rank: Any = None,
    world: World | None = None,
    files: Files | None = None,
    run: str | None = None,
) -> Checkpoint:
    """Save one checkpoint as exactly this directory, outside any store; durable on return.

    The directory may be new, empty, or an earlier keepstep checkpoint, which is then replaced in one
    step (files that somebody else put into it stay). Arguments are those of `Store` and `Store.save`, and
    `run`, the id of the run that saves it; None for a new one. Many ranks come to such saves in one order,
    whichever threads make them.

    Raises:
        DirectoryNotOursError: it holds something else; nothing was touched.
        StateError, StoreError: see `Store.save`.
    """
    if is_address(directory):
        raise UsageError(
            f"{os.fspath(directory)} is in a bucket; save there through Store(address).save(...)"
        )
    final = Path(directory).resolve()  # a link to a directory stays a link
    description = describe(
        step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned, environment=environment
    )
    changing = files if files is not None else LocalFiles()
    engine = make_engine(
        _MEMORY_BYTES,
        world or OneRank(),
        str(final),
        lambda: JoinedWorkspace(changing),
        topic=_TO_A_DIRECTORY,
    )
    lineage = Lineage(run=run or secrets.token_hex(8))
    order = Order(state=state, description=description, lineage=lineage, own=per_rank)

    def reserve() -> HostWorkspace:
        return LocalWorkspace(changing, final, may_replace=True)

    alone = world is None or world.size == 1
    with contextlib.nullcontext() if alone else _of_ranks.take(f"saving to {final}"):
        return Checkpoint(Path(directory), engine.save(reserve, order).write())
