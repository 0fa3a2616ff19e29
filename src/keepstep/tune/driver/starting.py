"""Which trial starts next, and its start."""

from __future__ import annotations

from collections.abc import Callable

from keepstep.errors import TuneError, UsageError
from keepstep.tune.driver.deciding import Decider, Suggestion
from keepstep.tune.driver.making import Maker
from keepstep.tune.driver.options import Options
from keepstep.tune.executors.protocol import Executor
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import Journal
from keepstep.tune.experiment.records import now
from keepstep.tune.experiment.trial import PENDING, Trial

__all__ = ["Starter"]


class Starter:
    """Makes trials of suggestions, and says which one may start.

    Args:
        history: the trials.
        journal: where new ones are written down.
        decider: who suggests and chooses.
        maker: of trials.
        executor: what there is to run on.
        options: of the driver.
        refuse: called with a trial that can never start, and why.
    """

    def __init__(
        self,
        history: History,
        journal: Journal,
        decider: Decider,
        maker: Maker,
        executor: Executor,
        options: Options,
        refuse: Callable[[Trial, str], None],
    ) -> None:
        self._history = history
        self._journal = journal
        self._decider = decider
        self._maker = maker
        self._executor = executor
        self._options = options
        self._refuse = refuse
        self.exhausted = False
        """Whether the searcher has nothing more."""

    def next_trial(self) -> Trial | None:
        """The trial that starts next if there is room for it; None: none, as things stand.

        Raises:
            UsageError: none can ever start.
        """
        self._stock_up()
        while (trial := self._unsaved() or self._decider.choose()) is not None:
            problem = self._executor.why_never(trial.resources)
            if problem is None:
                return trial
            if self._options.resources_alike:
                raise UsageError(
                    f"no trial can start, as each asks for the same: {problem}. Nothing was started, and "
                    "nothing of an experiment that was there has changed"
                )
            self._refuse(trial, problem)
            self._stock_up()
        return None

    def _unsaved(self) -> Trial | None:
        """One that had ended, and lacks only its last checkpoint: nobody has to decide about it any more."""
        unsaved = self._history.unsaved.values()
        return next((trial for trial in unsaved if trial.status == PENDING), None)

    def _stock_up(self) -> None:
        """Make trials of suggestions, as many as may wait."""
        limit = None if self._decider.scheduler.whole_population else self._decider.searcher.pending_limit
        while not self.exhausted and (limit is None or self._pending() < limit):
            if (
                self._options.num_samples is not None
                and len(self._history.trials) >= self._options.num_samples
            ):
                self.exhausted = True
                return
            trial_id, number = self._maker.next_id(), len(self._history.trials)
            suggested = self._decider.suggest(trial_id, number)
            if suggested is None:
                return
            if not isinstance(suggested, Suggestion):
                self.exhausted = True
                return
            self._make(trial_id, suggested)

    def _pending(self) -> int:
        return sum(trial.status == PENDING for trial in self._history.live.values())

    def _make(self, trial_id: str, suggested: Suggestion) -> None:
        record = self._maker.record(trial_id, suggested, now())
        self._journal.add(record)
        self._history.apply(record)
        trial = self._history.trial(trial_id)
        trial.config = suggested.config
        self._decider.added(trial)

    def no_room(self, trial: Trial) -> TuneError:
        """What is wrong with an executor that has no room for this trial, though nothing runs."""
        return TuneError(
            f"{trial} asks for {dict(trial.resources)}, and nothing runs, but "
            f"{type(self._executor).__name__}.fits says that there is no room for it, while its why_never "
            f"has no reason (total: {dict(self._executor.total)}). One of the two is wrong: that is a bug "
            "of the executor. All that was reported is kept; start the experiment again to go on"
        )
