"""What every executor can do, and what it and the driver tell each other.

A trial's process (or thread, or actor) reports and then waits for an order; the driver answers each
`Reported` and each `Saved` with one `Order`. So a result is in the driver's journal before the training goes
on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = [
    "Ended",
    "Event",
    "Executor",
    "Failed",
    "Go",
    "Job",
    "Next",
    "Order",
    "Reported",
    "Resources",
    "Saved",
    "SavedCheckpoint",
    "Started",
    "Stop",
]

Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One start of a trial.

    Attributes:
        run: unique for ever: of this start of this trial.
        trial_id: of the trial.
        trial_name: for people.
        experiment: the experiment's name.
        config: the trial's configuration; any objects, shipped by cloudpickle.
        path: the address of the trial's directory: a directory, or a place in a bucket.
        storage_options: for a bucket.
        resources: what it holds while it runs.
        env: environment variables of its own.
        checkpoint: the address of the checkpoint to go on from; None: from the beginning.
        iteration: `training_iteration` there.
        time_total_s: seconds of training up to there.
        next_checkpoint: the number of the first checkpoint that it makes. What lies there already was made by
            an earlier start and never reported: it is replaced.
        lineage: the id of the run that its checkpoints belong to (the experiment's id and the trial's).
        checkpoint_frequency: for classes; 0: only when asked.
        stdout: where its output goes; None: where the driver's goes.
        stderr: likewise.
    """

    run: str
    trial_id: str
    trial_name: str
    experiment: str
    config: dict[str, Any]
    path: str
    storage_options: Mapping[str, Any] | None = None
    resources: Resources = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    checkpoint: str | None = None
    iteration: int = 0
    time_total_s: float = 0.0
    next_checkpoint: int = 0
    lineage: str = ""
    checkpoint_frequency: int = 0
    stdout: str | None = None
    stderr: str | None = None


# --------------------------------------------------------------------------------- trial to driver


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedCheckpoint:
    """A checkpoint that was committed: its name in the trial's directory, and what it takes on disk."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The trial's own code is about to run."""

    run: str
    pid: int
    host: str
    node_ip: str = "127.0.0.1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """A result. The trial waits for an order.

    Attributes:
        run: of which start.
        iteration: `training_iteration`.
        time_this_iter_s: seconds since the result before, or since the start.
        metrics: what was reported: what JSON holds, NaN and infinities included; no automatic fields but
            `done` and `should_checkpoint` where the trial said so.
        left_out: {name: kind of value} of what JSON does not hold.
        checkpoint: what was committed with it.
    """

    run: str
    iteration: int
    time_this_iter_s: float
    metrics: dict[str, Any]
    left_out: dict[str, str] = field(default_factory=dict)
    checkpoint: SavedCheckpoint | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What `Go(save=True)` or `Stop(save=True)` asked for is committed. The trial waits for an order."""

    run: str
    iteration: int
    checkpoint: SavedCheckpoint | None
    """None: the trial has no `save_checkpoint`, so there is nothing to save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The trial's code is done, by itself or after `Stop`; its resources are free."""

    run: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """The trial's code raised, or its process died; its resources are free.

    Attributes:
        run: of which start.
        error: in one line: the type and message of the exception, or how the process ended ("killed by
            SIGKILL (out of memory?)").
        traceback: if an exception was raised; else "".
        killed: whether the process was ended from outside.
    """

    run: str
    error: str
    traceback: str = ""
    killed: bool = False


Event = Started | Reported | Saved | Ended | Failed


# --------------------------------------------------------------------------------- driver to trial


@dataclass(frozen=True, kw_only=True, slots=True)
class Go:
    """Train on; `save`: after saving a checkpoint: `Saved` follows, and waits for an order again."""

    save: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """End; `save`: after saving a checkpoint. `Saved` (if asked for) and `Ended` follow."""

    save: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Next:
    """End this trial, after saving if asked for, and go on with another one in the same process.

    Only for classes whose `reset_config` returns True; otherwise `Ended` follows as after `Stop`, and the
    job is started anew by the executor. `Started` of the new run follows.
    """

    job: Job
    save: bool = False


Order = Go | Stop | Next


class Executor(Protocol):
    """Runs trials. All calls are made from one thread; none waits, but `wait` and `close`."""

    @property
    def total(self) -> Resources:
        """What there is in all."""

    def fits(self, resources: Resources) -> bool:
        """Whether a job with these resources could start now: if it ever can, then when nothing runs."""

    def why_never(self, resources: Resources) -> str | None:
        """Why a job with these resources could never start, as "it asks for ..."; None: it could."""

    def launch(self, job: Job) -> None:
        """Start a trial: `Started` or `Failed` follows."""

    def order(self, run: str, order: Order) -> None:
        """Answer a `Reported` or `Saved` of this run. Without effect if it is over."""

    def kill(self, run: str) -> None:
        """End it now, with everything that it started; `Failed(killed=True)` follows."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """What happened, in order; at once if something did, else after `timeout_s`."""

    def close(self) -> None:
        """Kill what runs and free everything. Can be called twice."""
