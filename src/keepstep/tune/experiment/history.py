"""How an experiment stands: its trials, changed by the journal's records and by nothing else.

The same methods are called while it runs and when its journal is read again, so both come to the same.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from keepstep.errors import JournalError
from keepstep.tune.experiment.records import (
    Act,
    CheckpointSaved,
    CheckpointsDropped,
    DriverStarted,
    ExperimentEnded,
    ExperimentMade,
    Record,
    ResultReported,
    TrialAgain,
    TrialEnded,
    TrialFailed,
    TrialLaunched,
    TrialMade,
    TrialStarted,
)
from keepstep.tune.experiment.trial import (
    ERROR,
    PAUSED,
    PENDING,
    RUNNING,
    TERMINATED,
    CheckpointRecord,
    Trial,
)
from keepstep.tune.result import (
    CHECKPOINT_DIR_NAME,
    DATE,
    DONE,
    EXPERIMENT_TAG,
    HOSTNAME,
    ITERATIONS_SINCE_RESTORE,
    NODE_IP,
    PID,
    TIME_SINCE_RESTORE,
    TIME_THIS_ITER_S,
    TIME_TOTAL_S,
    TIMESTAMP,
    TRAINING_ITERATION,
    TRIAL_ID,
)

__all__ = ["ENDS_TRIALS", "History"]

ENDS_TRIALS: Final = frozenset({"time", "stop"})
"""Why an experiment ends so that its trials end with it, instead of waiting to go on."""
_ENDED_BY: Final = {
    "done": "itself",
    "stop": "stopper",
    "scheduler": "scheduler",
    "time": "time budget",
    "left": "restore",
}


class History:
    """The trials of an experiment.

    Args:
        made: the experiment's first record.
        path: the address of its directory, now: it may have been moved.
    """

    def __init__(self, made: ExperimentMade, path: str) -> None:
        self.made = made
        self.path = path.rstrip("/")
        self.trials: dict[str, Trial] = {}
        self.all: list[Trial] = []
        """The same, in the order in which they were made."""
        self.live: dict[str, Trial] = {}
        """Those that have not ended, in the order in which they were made."""
        self.unsaved: dict[str, Trial] = {}
        """Those that have, or had, ended, and lack the checkpoint that they end with (`Trial.ends_at`)."""
        self.ended: str | None = None
        """Why the experiment ended; None: it has not."""
        self.callbacks: dict[str, Any] = {}
        self.dropped_last: Sequence[tuple[str, str]] = ()
        """The checkpoints that were deleted last, or were about to be."""
        self._elapsed_s = 0.0
        self._seen_at = made.time
        self._where: dict[str, TrialStarted] = {}
        self._trial_started_s: dict[str, float] = {}

    @classmethod
    def of(cls, records: Iterable[Record], path: str) -> History:
        """What a journal's records come to.

        Raises:
            JournalError: they contradict each other.
        """
        told = iter(records)
        made = next(told, None)
        if not isinstance(made, ExperimentMade):
            raise JournalError(f"the journal of {path} is empty, or its head is missing")
        history = cls(made, path)
        for record in told:
            history.apply(record)
        return history

    def trial(self, trial_id: str) -> Trial:
        """The trial of this id.

        Raises:
            JournalError: there is none.
        """
        try:
            return self.trials[trial_id]
        except KeyError:
            raise JournalError(
                f"the journal of {self.path} speaks of a trial {trial_id!r} it has not"
            ) from None

    # ----------------------------------------------------------------------------------- records

    def apply(self, record: Record) -> None:
        """Let a record take effect; of a result, both halves."""
        if isinstance(record, ResultReported):
            self.reported(record)
            self.decided(record)
        elif isinstance(record, TrialFailed):
            self.failed(record)
        elif isinstance(record, TrialEnded):
            self.completed(record)
        else:
            self._pass_time(record)
            self._effects[type(record)](self, record)

    def _pass_time(self, record: Record) -> None:
        """Count the time since the record before; a clock that goes back counts nothing."""
        if isinstance(record, DriverStarted):
            self._seen_at = record.time
        elif record.time > self._seen_at:
            self._elapsed_s += record.time - self._seen_at
            self._seen_at = record.time

    def _driver_started(self, record: DriverStarted) -> None:
        self.ended = None
        for trial in self.live.values():
            if trial.status == RUNNING:
                trial.status = PENDING
        self._revive([trial for trial in self.unsaved.values() if trial.saves_last])

    def _revive(self, ended: Sequence[Trial]) -> None:
        """Trials that had ended wait to run again."""
        for trial in ended:
            trial.status = PENDING
        if ended:
            self.live = {id_: trial for id_, trial in self.trials.items() if not trial.is_finished()}

    def _lacks_nothing(self, trial: Trial) -> None:
        """The checkpoint that it ends with is there, or does not matter any more."""
        trial.ends_at = None
        self.unsaved.pop(trial.trial_id, None)

    def _trial_made(self, record: TrialMade) -> None:
        trial = Trial(
            trial_id=record.trial,
            number=len(self.trials),
            trainable_name=self.made.trainable,
            config=dict(record.config or {}),
            evaluated_params=dict(record.evaluated),
            experiment_tag=record.tag,
            dirname=record.dirname,
            path=f"{self.path}/{record.dirname}",
            resources=dict(record.resources),
            custom_name=record.name,
        )
        self.trials[trial.trial_id] = self.live[trial.trial_id] = trial
        self.all.append(trial)

    def elapsed_s(self, now: float) -> float:
        """Seconds that drivers worked on it until `now` (since 1970), the time between them left out."""
        return self._elapsed_s + max(0.0, now - self._seen_at)

    def _trial_launched(self, record: TrialLaunched) -> None:
        self.trial(record.trial).status = RUNNING

    def _trial_started(self, record: TrialStarted) -> None:
        trial = self.trial(record.trial)
        trial.status = RUNNING
        trial.starts += 1
        self._where[trial.trial_id] = record
        self._trial_started_s[trial.trial_id] = (
            trial.resume_from.time_total_s if trial.resume_from is not None else 0.0
        )

    def reported(self, record: ResultReported) -> None:
        """The first half of a result: the trial has it; nothing is decided yet."""
        self._pass_time(record)
        trial = self.trial(record.trial)
        trial.iteration, trial.time_total_s = record.iteration, record.total_s
        trial.last_result = {**self.result_of(record), DONE: False}
        if record.checkpoint is not None:
            self._add_checkpoint(trial, record, trial.last_result)

    def decided(self, record: ResultReported, *, acted: bool = False) -> None:
        """The second half: what was decided takes effect; `acted`: what a scheduler did has already."""
        trial = self.trial(record.trial)
        self.callbacks.update(record.callbacks)
        if not acted:
            self.act(record.acts)
        if record.saves:
            trial.ends_at = record.iteration
            self.unsaved[trial.trial_id] = trial
        if record.decision == "STOP":
            trial.last_result[DONE] = True
            self._finish(trial, record.why or "scheduler")
        elif record.decision == "PAUSE":
            trial.status = PAUSED

    def result_of(self, record: ResultReported) -> dict[str, Any]:
        """A result with its automatic fields."""
        trial = self.trial(record.trial)
        where = self._where.get(record.trial)
        started_s = self._trial_started_s.get(record.trial, 0.0)
        return {
            **record.metrics,
            DONE: record.decision == "STOP",
            TRIAL_ID: trial.trial_id,
            EXPERIMENT_TAG: trial.experiment_tag,
            TRAINING_ITERATION: record.iteration,
            TIME_THIS_ITER_S: record.this_s,
            TIME_TOTAL_S: record.total_s,
            TIME_SINCE_RESTORE: record.total_s - started_s,
            ITERATIONS_SINCE_RESTORE: record.since,
            TIMESTAMP: record.time,
            DATE: dt.datetime.fromtimestamp(record.time).astimezone().strftime("%Y-%m-%d_%H-%M-%S"),
            PID: where.pid if where else 0,
            HOSTNAME: where.host if where else "",
            NODE_IP: where.ip if where else "",
            CHECKPOINT_DIR_NAME: record.checkpoint,
        }

    def _add_checkpoint(
        self, trial: Trial, record: ResultReported | CheckpointSaved, metrics: Mapping[str, Any]
    ) -> None:
        assert record.checkpoint is not None
        made = CheckpointRecord(
            trial_id=trial.trial_id,
            name=record.checkpoint,
            iteration=record.iteration,
            time_total_s=record.total_s,
            bytes=record.bytes,
            metrics=metrics,
        )
        trial.checkpoints.append(made)
        trial.resume_from = made
        trial.next_checkpoint = int(record.checkpoint.rpartition("_")[2]) + 1

    def _checkpoint_saved(self, record: CheckpointSaved) -> None:
        trial = self.trial(record.trial)
        same = record.iteration == trial.last_result.get(TRAINING_ITERATION)
        self._add_checkpoint(trial, record, trial.last_result if same else {})
        if trial.ends_at is not None and record.iteration >= trial.ends_at:
            self._lacks_nothing(trial)
            if not trial.is_finished():  # it ran once more, for this checkpoint
                trial.status = TERMINATED
                self.live.pop(trial.trial_id)

    def _checkpoints_dropped(self, record: CheckpointsDropped) -> None:
        self.dropped_last = record.checkpoints
        for trial_id, name in record.checkpoints:
            trial = self.trial(trial_id)
            trial.checkpoints = [made for made in trial.checkpoints if made.name != name]

    def failed(self, record: TrialFailed, *, acted: bool = False) -> None:
        """A trial raised, or its process died; `acted` as for `decided`."""
        self._pass_time(record)
        trial = self.trial(record.trial)
        trial.num_failures += 1
        trial.error, trial.traceback = record.error, record.traceback
        if record.final:
            trial.status, trial.ended_by = ERROR, "error"
            self.live.pop(trial.trial_id, None)
        elif trial.ends_at is not None:
            self._revive([trial])
        elif trial.status == RUNNING:
            trial.status = PENDING
        if not acted:
            self.act(record.acts)

    def completed(self, record: TrialEnded, *, acted: bool = False) -> None:
        """A trial's code came to its end; `acted` as for `decided`."""
        self._pass_time(record)
        trial = self.trial(record.trial)
        if trial.last_result:
            trial.last_result[DONE] = True
        self._lacks_nothing(trial)
        self._finish(trial, record.why)
        if not acted:
            self.act(record.acts)

    def _trial_again(self, record: TrialAgain) -> None:
        trial = self.trial(record.trial)
        trial.error = trial.ended_by = None
        if record.anew:
            self._lacks_nothing(trial)
            trial.resume_from = None
            trial.iteration, trial.time_total_s, trial.last_result = 0, 0.0, {}
        self._revive([trial])

    def _experiment_ended(self, record: ExperimentEnded) -> None:
        self.ended = record.why
        for trial in list(self.live.values()):
            if record.why in ENDS_TRIALS:
                self._finish(trial, record.why)
            elif trial.status == RUNNING:
                trial.status = PENDING

    def _finish(self, trial: Trial, why: str) -> None:
        trial.status, trial.ended_by = TERMINATED, _ENDED_BY.get(why)
        self.live.pop(trial.trial_id, None)

    # -------------------------------------------------------------------------------------- acts

    def act(self, acts: Iterable[Act]) -> None:
        """What a scheduler did takes effect."""
        for act in acts:
            trial = self.trial(act.trial)
            if act.do == "exploit":
                self._exploit(trial, act)
            elif trial.is_finished() or trial.ends_at is not None:
                continue
            elif act.do == "stop":
                self._finish(trial, "scheduler")
            else:
                trial.status = PAUSED if act.do == "pause" else PENDING

    def _exploit(self, trial: Trial, act: Act) -> None:
        donor = self.trial(act.source or "")
        found = [made for made in donor.checkpoints if made.name == act.checkpoint]
        if not found:
            raise JournalError(
                f"the journal of {self.path} says that {trial} took over {act.checkpoint} of {donor}, which "
                "it does not have"
            )
        trial.resume_from = found[0]
        trial.iteration, trial.time_total_s = found[0].iteration, found[0].time_total_s
        trial.config = dict(act.config or {})
        trial.evaluated_params = dict(act.evaluated or {})
        trial.status = PAUSED

    _effects: Mapping[type, Callable[[History, Any], None]] = {
        DriverStarted: _driver_started,
        TrialMade: _trial_made,
        TrialLaunched: _trial_launched,
        TrialStarted: _trial_started,
        CheckpointSaved: _checkpoint_saved,
        CheckpointsDropped: _checkpoints_dropped,
        TrialAgain: _trial_again,
        ExperimentEnded: _experiment_ended,
    }
