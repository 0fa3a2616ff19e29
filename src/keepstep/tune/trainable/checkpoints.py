"""Checkpoints of trials: what a `Trainable` writes or returns is committed, and handed back to it.

Loaded when the first checkpoint is made or asked for: `keepstep.tune.trainable.savers` says where it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any, Protocol

from keepstep.errors import UsageError
from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.saving import Saved, Saver

__all__ = ["commit", "load"]


class Saveable(Protocol):
    """The methods of `Trainable` that this needs."""

    @property
    def training_iteration(self) -> int: ...

    def save_checkpoint(self, checkpoint_dir: str) -> Any: ...

    def load_checkpoint(self, checkpoint: Any) -> None: ...


def commit(trainable: Saveable, saver: Saver, metrics: Mapping[str, Any]) -> Saved:
    """Have it save, and commit that; durable on return.

    Args:
        trainable: what is to save.
        saver: commits.
        metrics: of the result that the checkpoint belongs to.

    Raises:
        UsageError: `save_checkpoint` returned something else than it may.
        StateError: it returned a dict that can't be saved.
    """
    with tempfile.TemporaryDirectory(prefix="keepstep-trial-") as directory:
        said = trainable.save_checkpoint(directory)
        what = said if isinstance(said, dict) else Checkpoint.from_directory(directory)
        if not isinstance(said, dict) and said is not None and not _is(said, directory):
            raise UsageError(
                f"{type(trainable).__name__}.save_checkpoint() returned {said!r:.200} "
                f"({type(said).__name__}); expected None or the directory that it was given (the files in it "
                "are the checkpoint), or a dict"
            )
        return saver.save(what, iteration=trainable.training_iteration, metrics=metrics)


def _is(said: Any, directory: str) -> bool:
    return isinstance(said, str | os.PathLike) and os.path.realpath(said) == os.path.realpath(directory)


def load(trainable: Saveable, checkpoint: Checkpoint) -> None:
    """Hand it what it saved: the dict, or the directory with its files."""
    if checkpoint.is_state:
        trainable.load_checkpoint(checkpoint.load())
        return
    with checkpoint.as_directory() as directory:
        trainable.load_checkpoint(directory)
