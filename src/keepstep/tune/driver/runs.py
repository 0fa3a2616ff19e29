"""What runs now: one start of a trial each."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from keepstep.tune.driver.options import Options
from keepstep.tune.executors.protocol import Job
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.trial import Trial

__all__ = ["Run", "job_of"]


@dataclass(slots=True)
class Run:
    """A start of a trial.

    Attributes:
        job: what was launched.
        trial: of which trial.
        total_s: seconds of training up to its last report.
        since: how many results it reported.
        heard_s: when it was heard of last, on the clock of `time.monotonic`.
        over: whether it was told to end: what becomes of its trial is decided.
        saving: whether it was told to end with a checkpoint, which has yet to come.
        silenced: it was killed for its silence, after so many seconds.
    """

    job: Job
    trial: Trial
    total_s: float
    since: int = 0
    heard_s: float = field(default_factory=time.monotonic)
    over: bool = False
    saving: bool = False
    silenced: float | None = None

    @property
    def id(self) -> str:
        """Unique for ever."""
        return self.job.run


def job_of(history: History, trial: Trial, options: Options) -> Job:
    """What an executor needs to start a trial, from where it stands.

    Args:
        history: of the experiment.
        trial: which.
        options: of the driver.
    """
    origin = trial.resume_from
    return Job(
        run=f"{trial.trial_id}.{trial.starts + 1}",
        trial_id=trial.trial_id,
        trial_name=str(trial),
        experiment=history.made.name,
        config=trial.config,
        path=trial.path,
        storage_options=options.storage_options,
        resources=trial.resources,
        env=options.env(trial.config),
        checkpoint=None if origin is None else f"{history.trial(origin.trial_id).path}/{origin.name}",
        iteration=0 if origin is None else origin.iteration,
        time_total_s=0.0 if origin is None else origin.time_total_s,
        next_checkpoint=trial.next_checkpoint,
        lineage=f"{history.made.id}{trial.number:08x}",
        checkpoint_frequency=options.checkpoints.checkpoint_frequency,
        stdout=f"{trial.path}/{options.outputs[0]}",
        stderr=f"{trial.path}/{options.outputs[1]}",
    )
