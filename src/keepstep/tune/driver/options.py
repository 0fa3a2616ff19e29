"""What a driver is told, once everything that the user said was looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from keepstep.tune.settings import CheckpointConfig, FailureConfig

__all__ = ["Options"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a driver is told.

    Attributes:
        is_class: whether the trainable is a class, which saves when it is told to.
        saves: whether such a class can save.
        resources_alike: whether every trial asks for the same.
        reuse: whether its processes go on with the next trial.
        num_samples: most trials; None: as many as the searcher suggests.
        max_concurrent: most trials at a time; None: as many as fit.
        time_budget_s: of the experiment, over all restarts.
        checkpoints: which are made.
        failures: what happens when a trial fails.
        storage_options: for a bucket.
        env: environment variables of a trial, from its configuration.
        outputs: names of the files for what a trial prints.
        grace_s: how long trials may take to report once more when the experiment is to end.
    """

    is_class: bool
    saves: bool = False
    resources_alike: bool = False
    reuse: bool = False
    num_samples: int | None = None
    max_concurrent: int | None = None
    time_budget_s: float | None = None
    checkpoints: CheckpointConfig
    failures: FailureConfig
    storage_options: Mapping[str, Any] | None = None
    env: Callable[[dict[str, Any]], Mapping[str, str]]
    outputs: tuple[str, str] = ("stdout", "stderr")
    grace_s: float = 30.0

    @property
    def save_at_end(self) -> bool:
        """Whether a trial saves when it ends."""
        return self.saves and self.checkpoints.checkpoint_at_end is not False
