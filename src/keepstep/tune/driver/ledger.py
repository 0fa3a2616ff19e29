"""What becomes of trials: written down, and told to everybody who has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from keepstep.tune.driver.audience import Audience
from keepstep.tune.driver.deciding import Decider
from keepstep.tune.driver.halting import Halt
from keepstep.tune.driver.keeper import Keeper
from keepstep.tune.executors.protocol import SavedCheckpoint, Started
from keepstep.tune.experiment.history import ENDS_TRIALS, History
from keepstep.tune.experiment.journal import Journal
from keepstep.tune.experiment.records import (
    Act,
    CheckpointSaved,
    ExperimentEnded,
    TrialEnded,
    TrialFailed,
    TrialLaunched,
    TrialStarted,
    now,
)
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.settings import FailureConfig

__all__ = ["Ledger"]


class Ledger:
    """Enters into journal and history what happened to trials; results are the driver's own business.

    Args:
        history: how the experiment stands.
        journal: what it writes down.
        decider: who decides what follows.
        audience: who is told.
        show_end: shows people that a trial ended well.
        keeper: which checkpoints stay.
        halt: why the experiment may end before all is done.
        failures: what happens when a trial fails.
    """

    def __init__(
        self,
        *,
        history: History,
        journal: Journal,
        decider: Decider,
        audience: Audience,
        show_end: Callable[[Trial], None],
        keeper: Keeper,
        halt: Halt,
        failures: FailureConfig,
    ) -> None:
        self._history = history
        self._journal = journal
        self._decider = decider
        self._audience = audience
        self._show_end = show_end
        self._keeper = keeper
        self._halt = halt
        self._failures = failures

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

    def saved(self, trial: Trial, iteration: int, total_s: float, made: SavedCheckpoint) -> None:
        """It committed a checkpoint; one that it was to end with completes it."""
        was_missing = trial.ends_at is not None
        self._enter(
            CheckpointSaved(
                time=now(),
                trial=trial.trial_id,
                iteration=iteration,
                total_s=total_s,
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
        acts = self._decider.completed(trial, again=again)
        self._journal.add(replace(draft, acts=acts))
        self.completed(trial)
        self.stopped(acts)

    def completed(self, trial: Trial) -> None:
        """It ended well; what it ends with may still be missing, and then it is told of later."""
        if trial.ends_at is None:
            self._audience.completed(trial)
            self._show_end(trial)
            self._keeper.finished(trial)

    def stopped(self, acts: Iterable[Act], *, by: Trial | None = None) -> None:
        """A scheduler stopped trials, whether they run or wait; `by`: the one that reports has yet to end."""
        for act in acts:
            if act.do == "stop" and (by is None or act.trial != by.trial_id):
                self.completed(self._history.trial(act.trial))

    def refused(self, trial: Trial, problem: str) -> None:
        """It can never start, or go on."""
        self.failed(trial, problem, "", final=True)

    def failed(self, trial: Trial, error: str, traceback: str, *, final: bool = False) -> None:
        """It failed; `final`: for good, however often failures are allowed."""
        failures = self._failures
        final = final or (failures.max_failures != -1 and trial.num_failures >= failures.max_failures)
        final = final or self._halt.reason in ENDS_TRIALS
        draft = TrialFailed(time=now(), trial=trial.trial_id, error=error, traceback=traceback, final=final)
        self._history.failed(draft, acted=True)
        acts = self._decider.failed(trial) if final else ()
        self._journal.add(replace(draft, acts=acts))
        self._audience.failed(trial, final=final)
        if final:
            self._keeper.finished(trial)
            self.stopped(acts)
            if failures.fail_fast:
                self._halt.because("failed")

    def all_over(self, why: str) -> None:
        """The experiment ended; where nothing goes on after that, so did trials."""
        live = list(self._history.live.values())
        self._enter(ExperimentEnded(time=now(), why=why))
        for trial in live:
            if trial.is_finished() and trial.starts:
                self.completed(trial)
