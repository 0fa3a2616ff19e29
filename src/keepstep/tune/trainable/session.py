"""What a trial's code may ask for: `tune.report`, `tune.get_checkpoint`, `tune.get_context`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from keepstep.errors import UsageError
from keepstep.tune.trainable.bundles import PlacementGroupFactory

if TYPE_CHECKING:
    from keepstep.tune.checkpoint import Checkpoint

__all__ = [
    "Session",
    "TrialStopped",
    "TuneContext",
    "current",
    "enter",
    "get_checkpoint",
    "get_context",
    "in_tune_session",
    "report",
]


class TrialStopped(BaseException):
    """Unwinds a trial's code that is not to go on; no error, so `except Exception` lets it pass."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One start of a trial, as its own code sees it.

    Attributes:
        trial_id: of the trial.
        trial_name: for people.
        experiment_name: of the experiment.
        working_dir: in which its code runs, on this machine.
        resources: what it holds.
        pid: the process in which it runs.
        report: takes a result, a checkpoint or None, and who says it; returns when it is on disk.
        checkpoint: what to go on from, when it is asked for; None: from the beginning.
    """

    trial_id: str
    trial_name: str
    experiment_name: str
    working_dir: str
    resources: PlacementGroupFactory
    pid: int
    report: Callable[[Any, Any, str], None]
    checkpoint: Callable[[], Checkpoint | None]


_entered: list[Session] = []


def enter(session: Session | None) -> None:
    """From now on the code of this trial runs; None: of no trial."""
    _entered[:] = [session] if session is not None else []


def current() -> Session | None:
    """The trial whose code runs; None: of no trial."""
    return _entered[0] if _entered else None


def in_tune_session() -> bool:
    """Whether the code that asks is run by a trial."""
    return bool(_entered)


def _session(asked: str) -> Session:
    session = current()
    if session is None:
        raise UsageError(
            f"{asked} was called outside of a trial; it works in the function or class that is given to "
            "tune.Tuner, while Tuner.fit() runs it"
        )
    if session.pid != os.getpid():
        raise UsageError(
            f"{asked} was called in process {os.getpid()}, which trial {session.trial_name} (process "
            f"{session.pid}) started; call it in the trial's own process"
        )
    return session


def report(metrics: Any, *, checkpoint: Any = None) -> None:
    """Report a result; returns when it is on disk.

    Each call is one more `training_iteration`. A trial that is to end (its scheduler, a stopper, Ctrl-C) is
    unwound here: `finally` blocks run.

    Args:
        metrics: {name: value}, nested ones too. What JSON can't hold is left out, which is said once. A bare
            number is the metric "_metric".
        checkpoint: committed with it: a `tune.Checkpoint` of a directory, or, beyond Ray, a state as
            `keepstep.Store.save` takes it (modules, optimizers, tensors, numbers ... in dicts), or a
            `keepstep.Checkpoint`. It is durable when this returns.

    Raises:
        UsageError: not within a trial, or these are no metrics, or the directory can't be taken over.
        StateError: the state can't be saved.
    """
    _session("tune.report()").report(metrics, checkpoint, "tune.report()")


def get_checkpoint() -> Checkpoint | None:
    """The checkpoint that this trial goes on from; None: it starts from the beginning.

    Raises:
        UsageError: not within a trial.
    """
    return _session("tune.get_checkpoint()").checkpoint()


class TuneContext:
    """What a trial may know of itself."""

    def get_experiment_name(self) -> str:
        """The experiment's name."""
        return _session("get_experiment_name()").experiment_name

    def get_trial_name(self) -> str:
        """The trial's name, for people."""
        return _session("get_trial_name()").trial_name

    def get_trial_id(self) -> str:
        """The trial's id, unique within its experiment."""
        return _session("get_trial_id()").trial_id

    def get_trial_resources(self) -> PlacementGroupFactory:
        """What the trial holds while it runs."""
        return _session("get_trial_resources()").resources

    def get_trial_dir(self) -> str:
        """The trial's working directory: `working_dir/` in its directory.

        Files in it stay, and are there again when the trial goes on; of an experiment in a bucket they go
        when the trial's process ends.
        """
        return _session("get_trial_dir()").working_dir

    def get_world_size(self) -> int:
        """1: a trial is one process."""
        return 1

    def get_world_rank(self) -> int:
        """0: a trial is one process."""
        return 0

    def get_local_rank(self) -> int:
        """0: a trial is one process."""
        return 0

    def get_local_world_size(self) -> int:
        """1: a trial is one process."""
        return 1

    def get_node_rank(self) -> int:
        """0: a trial is one process."""
        return 0


_context = TuneContext()


def get_context() -> TuneContext:
    """What this trial may know of itself; its methods raise outside of a trial."""
    return _context
