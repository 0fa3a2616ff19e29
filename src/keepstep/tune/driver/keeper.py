"""Which checkpoints of the experiment are deleted, and when: never before the journal says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from keepstep.errors import StoreError
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import Journal
from keepstep.tune.experiment.keeping import Holding, Key, Verdict, key_of, over_budget, superfluous
from keepstep.tune.experiment.records import CheckpointsDropped
from keepstep.tune.experiment.removal import delete, sweep
from keepstep.tune.experiment.trial import TERMINATED, CheckpointRecord, Trial
from keepstep.tune.settings import CheckpointConfig

__all__ = ["Keeper"]


class Keeper:
    """Applies `CheckpointConfig` and the byte budget.

    Args:
        history: the trials.
        journal: where deletions are written down before they happen.
        rules: which checkpoints of a trial stay.
        byte_budget: of all trials together; None: any.
        storage_options: for a bucket.
        say: tells people something.
    """

    def __init__(
        self,
        history: History,
        journal: Journal,
        *,
        rules: CheckpointConfig,
        byte_budget: int | None,
        storage_options: Mapping[str, Any] | None,
        say: Callable[[str], None],
    ) -> None:
        self._history = history
        self._journal = journal
        self._rules = rules
        self._byte_budget = byte_budget
        self._storage_options = storage_options
        self._say = say
        self._said: set[str] = set()
        self._changed: dict[str, Trial] = {}
        self._pins: set[Key] = set()
        self._undeleted: list[Key] = []

    def added(self, trial: Trial) -> None:
        """A trial has a new checkpoint."""
        self._changed[trial.trial_id] = trial

    def finished(self, trial: Trial) -> None:
        """A trial ended: what it needed to go on need not stay."""
        if trial.checkpoints:
            self._changed[trial.trial_id] = trial

    def doomed(self, now: float) -> Sequence[Key]:
        """What is to go, added to the journal: to be deleted once that is durable."""
        if not self._changed:
            return ()
        changed, self._changed = self._changed, {}
        before, self._pins = self._pins, self._pinned()
        pinned = self._pins
        for trial_id, _ in before - pinned:  # what was kept for another trial need not be any more
            changed.setdefault(trial_id, self._history.trial(trial_id))
        dropped: list[CheckpointRecord] = []
        for trial in changed.values():
            dropped += self._heard(superfluous(_holding(trial), self._rules, pinned=pinned))
        self._note(dropped, now)
        if self._byte_budget is not None:
            holdings = [_holding(trial) for trial in self._history.all if trial.checkpoints]
            more = self._heard(over_budget(holdings, self._byte_budget, self._rules, pinned=pinned))
            self._note(more, now)
            dropped += more
        return [key_of(record) for record in dropped]

    def _pinned(self) -> set[Key]:
        """What trials that are not over go on from, or were started from."""
        going_on = [*self._history.live.values(), *self._history.unsaved.values()]
        return {key_of(trial.resume_from) for trial in going_on if trial.resume_from is not None}

    def _heard(self, verdict: Verdict) -> list[CheckpointRecord]:
        for topic, message in verdict.messages.items():
            if topic not in self._said:
                self._said.add(topic)
                self._say(message)
        return list(verdict.drop)

    def _note(self, dropped: Sequence[CheckpointRecord], now: float) -> None:
        if dropped:
            record = CheckpointsDropped(time=now, checkpoints=tuple(map(key_of, dropped)))
            self._journal.add(record)
            self._history.apply(record)

    def delete(self, doomed: Iterable[Key]) -> None:
        """Delete what the journal says is gone. What is being read is tried again later."""
        names: dict[str, list[str]] = {}
        for trial_id, name in [*self._undeleted, *doomed]:
            names.setdefault(trial_id, []).append(name)
        self._undeleted = []
        for trial_id, gone in names.items():
            try:
                busy = delete(self._history.trial(trial_id).path, gone, self._storage_options)
            except StoreError as error:
                self._say(f"checkpoints that are not kept could not be deleted: {error}")
            else:
                self._undeleted += [(trial_id, name) for name in busy]

    def clear_up(self) -> None:
        """Before anything runs: finish what a killed driver had begun, and remove what trials left."""
        self.delete(self._history.dropped_last)
        for trial in self._history.live.values():
            if trial.starts:
                sweep(trial.path, {made.name for made in trial.checkpoints}, self._storage_options)


def _holding(trial: Trial) -> Holding:
    return Holding(records=trial.checkpoints, may_go_on=trial.status != TERMINATED or trial.saves_last)
