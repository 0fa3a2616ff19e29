"""Where a restored state comes from: the project's store, a directory, or one that Accelerate wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from keepstep.checkpoint.convert.accelerate import AccelerateState, read_accelerate_state
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.train.resuming.hooked import StateHooks
from keepstep.train.resuming.importing import Importer
from keepstep.train.resuming.state import Captured, TrainState
from keepstep.world import World

__all__ = ["Origins", "lies_in", "together"]


class Origins:
    """Makes what `TrainState.restore` is given: a function that loads into live objects.

    Args:
        state: to restore into.
        hooks: of the script.
    """

    def __init__(self, state: TrainState, hooks: StateHooks) -> None:
        self._state = state
        self._world = state.world
        self._hooks = hooks

    def newest_of(self, store: Store) -> Callable[[Captured], Checkpoint | None]:
        """The newest valid checkpoint of a store; it loads None if there is none."""
        models = self._state.models
        return lambda live: store.load_latest_with(
            lambda checkpoint, agree: self._hooks.load_into(checkpoint, models, live.shared, live.own, agree)
        )

    def directory(
        self, input_dir: str | os.PathLike[str], store: Store | None
    ) -> Callable[[Captured], Checkpoint]:
        """A given checkpoint, which a store is to go on from."""

        def load(live: Captured) -> Checkpoint:
            with together(self._world, "opening a checkpoint"):
                checkpoint = Checkpoint.open(input_dir)
            with together(self._world, "loading a checkpoint") as agree:
                self._hooks.load_into(checkpoint, self._state.models, live.shared, live.own, agree)
            if store is not None:
                store.go_on_from(checkpoint)
            return checkpoint

        return load

    def of_accelerate(self, input_dir: str | os.PathLike[str]) -> Callable[[Captured], AccelerateState]:
        """What Accelerate saved."""
        with together(self._world, "reading a checkpoint of Accelerate's"):
            importer = Importer(self._state, read_accelerate_state(input_dir, self._world.rank))
            importer.check()

        def load(live: Captured) -> AccelerateState:
            with together(self._world, "loading a checkpoint of Accelerate's") as agree:
                return importer.run(live.own["generators"], agree)

        return load


@contextmanager
def together(world: World, topic: str) -> Iterator[Callable[[], object]]:
    """What raises on one rank raises on all; hands out what lets ranks agree on the way, once."""
    with world.meeting(topic) as meeting:
        yield lambda: meeting.exchange(b"")
        meeting.exchange(b"")


def lies_in(checkpoint: Checkpoint, root: object) -> bool:
    """Whether a checkpoint is one of those that lie in a directory."""
    place = checkpoint.place
    return isinstance(root, Path) and isinstance(place, Path) and place.resolve().parent == root.resolve()
