"""One trial: a configuration, and how far its training has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.result import TRAINING_ITERATION, look_up

__all__ = [
    "ERROR",
    "FINISHED",
    "PAUSED",
    "PENDING",
    "RUNNING",
    "TERMINATED",
    "CheckpointRecord",
    "Resources",
    "Trial",
]

PENDING: Final = "PENDING"
"""Waits to be started, for the first time or to go on after a failure or a restart."""
RUNNING: Final = "RUNNING"
PAUSED: Final = "PAUSED"
"""Stopped by a scheduler, to go on from its checkpoint later."""
TERMINATED: Final = "TERMINATED"
ERROR: Final = "ERROR"
FINISHED: Final = frozenset({TERMINATED, ERROR})

Resources = Mapping[str, float]
"""What a trial holds while it runs: {"cpu": 1.0, "gpu": 0.5, ...}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRecord:
    """A committed checkpoint of a trial.

    Attributes:
        trial_id: whose directory it lies in.
        name: there ("checkpoint_000003").
        iteration: the trial's `training_iteration` when it was made.
        time_total_s: and its seconds of training.
        bytes: what it takes on disk.
        metrics: the result it was reported with.
    """

    trial_id: str
    name: str
    iteration: int
    time_total_s: float
    bytes: int
    metrics: Mapping[str, Any]


@dataclass(eq=False, slots=True)
class Trial:
    """One trial of an experiment. Its fields change only by `experiment.history`, as the journal says.

    Attributes:
        trial_id: unique within its experiment.
        number: 0 for the first.
        trainable_name: of the function or class.
        config: the configuration, complete.
        evaluated_params: what of it was drawn or picked: {"lr": 0.1, "layer/width": 3}.
        experiment_tag: number and `evaluated_params`, as a name.
        dirname: its directory within the experiment's.
        path: the address of its directory.
        resources: what it needs to run.
        status: one of the constants above.
        last_result: the newest result, with the automatic fields; {} before the first.
        iteration: `training_iteration` of the last result that counts.
        time_total_s: seconds of training up to there.
        num_failures: how often it failed.
        starts: how often it was started.
        error: of the last failure: what it was, for people; None: it never failed.
        traceback: of the last failure, if it was an exception.
        checkpoints: those that are still there, oldest first.
        resume_from: the checkpoint that the next start goes on from; it may lie with another trial.
        next_checkpoint: the number of the next checkpoint in its directory.
        custom_name: what `trial_name_creator` said.
        ends_at: the iteration with which it ended, as long as the checkpoint that it ends with is not there;
            None: nothing is missing.
        ended_by: who ended it: "itself", "stopper", "scheduler", "time budget", "restore" or "error"; None:
            it has not ended.
    """

    PENDING: ClassVar[str] = "PENDING"
    RUNNING: ClassVar[str] = "RUNNING"
    PAUSED: ClassVar[str] = "PAUSED"
    TERMINATED: ClassVar[str] = "TERMINATED"
    ERROR: ClassVar[str] = "ERROR"

    trial_id: str
    number: int
    trainable_name: str
    config: dict[str, Any]
    evaluated_params: dict[str, Any]
    experiment_tag: str
    dirname: str
    path: str
    resources: Resources
    status: str = PENDING
    last_result: dict[str, Any] = field(default_factory=dict)
    iteration: int = 0
    time_total_s: float = 0.0
    num_failures: int = 0
    starts: int = 0
    error: str | None = None
    traceback: str = ""
    checkpoints: list[CheckpointRecord] = field(default_factory=list)
    resume_from: CheckpointRecord | None = None
    next_checkpoint: int = 0
    custom_name: str | None = None
    ends_at: int | None = None
    ended_by: str | None = None

    @property
    def saves_last(self) -> bool:
        """Whether it ended, but for its last checkpoint."""
        return self.status == TERMINATED and self.ends_at is not None

    @property
    def stopped_by(self) -> str | None:
        """Who else than itself ended it well; None: nobody."""
        return self.ended_by if self.status == TERMINATED and self.ended_by != "itself" else None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest of its own checkpoints; one in a bucket finds credentials in the environment."""
        return Checkpoint(f"{self.path}/{self.checkpoints[-1].name}") if self.checkpoints else None

    @property
    def local_path(self) -> str:
        """The address of its directory; a script written for Ray Tune may ask by this name."""
        return self.path

    def is_finished(self) -> bool:
        """Whether it ended, well or not."""
        return self.status in FINISHED

    def metric(self, name: str) -> Any:
        """The newest value of a metric; nested ones by "a/b". None if it was never reported."""
        return look_up(self.last_result, name)

    @property
    def training_iteration(self) -> int:
        """Of the newest result."""
        return int(self.last_result.get(TRAINING_ITERATION, 0))

    def __str__(self) -> str:
        return self.custom_name or f"{self.trainable_name}_{self.trial_id}"

    __repr__ = __str__

    def __hash__(self) -> int:
        return hash(self.trial_id)
