"""What saves and opens checkpoints, loaded by the first that does: a trial without any is spared it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepstep.tune.checkpoint import Checkpoint
    from keepstep.tune.saving import Saved, Saver

__all__ = ["commit", "load", "make_saver", "open_checkpoint"]


def make_saver(path: str, **told: Any) -> Saver:
    """A `keepstep.tune.saving.Saver`."""
    made: Saver = import_module("keepstep.tune.saving").Saver(path, **told)
    return made


def open_checkpoint(path: str, storage_options: Mapping[str, Any] | None = None) -> Checkpoint:
    """A `keepstep.tune.checkpoint.Checkpoint`."""
    made: Checkpoint = import_module("keepstep.tune.checkpoint").Checkpoint(
        path, storage_options=storage_options
    )
    return made


def commit(trainable: Any, saver: Saver, metrics: Mapping[str, Any]) -> Saved:
    """As `keepstep.tune.trainable.checkpoints.commit`."""
    made: Saved = import_module("keepstep.tune.trainable.checkpoints").commit(trainable, saver, metrics)
    return made


def load(trainable: Any, checkpoint: Checkpoint) -> None:
    """As `keepstep.tune.trainable.checkpoints.load`."""
    import_module("keepstep.tune.trainable.checkpoints").load(trainable, checkpoint)
