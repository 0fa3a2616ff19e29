"""`Saver`: commits what a trial's process saves, as checkpoints of the trial's directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Saved", "Saver"]


class Saved(NamedTuple):
    """A checkpoint that was committed: its name in the trial's directory, and the bytes of its files."""

    name: str
    bytes: int


class Saver:
    """Saves the checkpoints of one start of a trial, one after another.

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
        raise NotImplementedError(path, storage_options, lineage, next_checkpoint, resumed_from)

    def save(self, what: Any, *, iteration: int, metrics: Mapping[str, Any]) -> Saved:
        """Commit a checkpoint; it is durable on return.

        Args:
            what: a `tune.Checkpoint`, a `keepstep.Checkpoint`, or a state as `keepstep.Store.save` takes it.
            iteration: `training_iteration` of the result that it belongs to; its step.
            metrics: of that result.

        Raises:
            StateError: the state cannot be saved as it is.
            UsageError: a directory that can't be taken over: it is gone, holds links, or changes meanwhile.
            StoreError: the place refuses; nothing was committed.
        """
        raise NotImplementedError(what, iteration, metrics)
