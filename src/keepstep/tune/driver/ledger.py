"""What becomes of trials: written down, and told to everybody who has to know."""

from __future__ import annotations

import time
from dataclasses import replace

from keepstep.tune.driver.audience import Audience
from keepstep.tune.driver.deciding import Decider
from keepstep.tune.driver.halting import Halt
from keepstep.tune.driver.keeper import Keeper
from keepstep.tune.driver.options import Options
from keepstep.tune.driver.runs import Run
from keepstep.tune.driver.showing import Showing
from keepstep.tune.executors.protocol import SavedCheckpoint, Started
from keepstep.tune.experiment.history import ENDS_TRIALS, History
from keepstep.tune.experiment.journal import Journal
from keepstep.tune.experiment.records import (
    CheckpointSaved,
    ExperimentEnded,
    TrialEnded,
    TrialFailed,
    TrialLaunched,
    TrialStarted,
)
from keepstep.tune.experiment.trial import Trial

__all__ = ["Ledger", "now"]


class Ledger:
    """Enters into journal and history what happened to trials; results are the driver's own business.

    Args:
        history: how the experiment stands.
        journal: what it writes down.
        decider: who decides what follows.
        audience: who is told.
        showing: what people see.
        keeper: which checkpoints stay.
        halt: why the experiment may end before all is done.
        options: what the user said.
    """

    def __init__(
        self,
        *,
        history: History,
        journal: Journal,
        decider: Decider,
        audience: Audience,
        showing: Showing,
        keeper: Keeper,
        halt: Halt,
        options: Options,
    ) -> None:
        self._history = history
        self._journal = journal
        self._decider = decider
        self._audience = audience
        self._showing = showing
        self._keeper = keeper
        self._halt = halt
        self._options = options

    def _enter(self, record: TrialLaunched | TrialStarted | CheckpointSaved | ExperimentEnded) -> None:
        self._journal.add(record)
        self._history.apply(record)

    def launched(self, trial: Trial) -> None:
        """A start of it was handed to the executor."""
        self._enter(TrialLaunched(time=now(), trial=trial.trial_id))

    def started(self, trial: Trial, event: Started) -> None:
        """Its own code is about to run."""
        self._enter(
            TrialStarted(time=now(), trial=trial.trial_id, pid=event.pid, host=event.host, ip=event.node_ip)
        )

    def saved(self, run: Run, iteration: int, made: SavedCheckpoint) -> None:
        """It committed a checkpoint; one that it was to end with completes it."""
        trial = run.trial
        was_missing = trial.ends_at is not None
        self._enter(
            CheckpointSaved(
                time=now(),
                trial=trial.trial_id,
                iteration=iteration,
                total_s=run.total_s,
                checkpoint=made.name,
                bytes=made.bytes,
            )
        )
        self.kept(trial)
        if was_missing:
            self.completed(trial)

    def kept(self, trial: Trial) -> None:
        """Its newest checkpoint is in the journal."""
        self._audience.checkpointed(trial, trial.checkpoints[-1])
        self._keeper.added(trial)

    def ended(self, trial: Trial) -> None:
        """Its code came to its end by itself."""
        again = trial.ends_at is not None
        draft = TrialEnded(time=now(), trial=trial.trial_id)
        self._history.completed(draft, acted=True)
        self._journal.add(replace(draft, acts=self._decider.completed(trial, again=again)))
        self.completed(trial)

    def completed(self, trial: Trial) -> None:
        """It ended well; what it ends with may still be missing, and then it is told of later."""
        if trial.ends_at is None:
            self._audience.completed(trial)
            self._showing.ended(trial)
            self._keeper.finished(trial)

    def ended_by_another(self, trial: Trial) -> None:
        """A scheduler stopped it when another trial reported; it may have been finished by that."""
        if trial.is_finished():
            self._audience.completed(trial)
            self._keeper.finished(trial)

    def refused(self, trial: Trial, problem: str) -> None:
        """It can never start, or go on."""
        self.failed(trial, problem, "", final=True)

    def failed(self, trial: Trial, error: str, traceback: str, *, final: bool = False) -> None:
        """It failed; `final`: for good, however often failures are allowed."""
        failures = self._options.failures
        final = final or (failures.max_failures != -1 and trial.num_failures >= failures.max_failures)
        final = final or self._halt.reason in ENDS_TRIALS
        draft = TrialFailed(time=now(), trial=trial.trial_id, error=error, traceback=traceback, final=final)
        self._history.failed(draft, acted=True)
        acts = self._decider.failed(trial) if final else ()
        self._journal.add(replace(draft, acts=acts))
        self._audience.failed(trial, final=final)
        if final:
            self._keeper.finished(trial)
            if failures.fail_fast:
                self._halt.because("failed")

    def all_over(self, why: str) -> None:
        """The experiment ended."""
        self._enter(ExperimentEnded(time=now(), why=why))


def now() -> float:
    """The time as the journal has it: seconds since 1970."""
    return round(time.time(), 3)
