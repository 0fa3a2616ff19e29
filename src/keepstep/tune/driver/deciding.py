"""Who decides: searcher, scheduler and stopper, told of everything in the order of the journal.

They are told the same while an experiment runs and when its journal is read again, so they come to stand
where they stood.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keepstep.errors import TrialError, TuneError
from keepstep.tune.driver.plain import plain, shown
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import Act
from keepstep.tune.experiment.trial import RUNNING, CheckpointRecord, Trial
from keepstep.tune.result import DONE
from keepstep.tune.schedulers.base import Decision, TrialScheduler
from keepstep.tune.search.base import Searcher
from keepstep.tune.search.space import completed, flat
from keepstep.tune.stopper import Stopper

__all__ = ["Decider", "Steering", "Suggestion", "Verdict"]

_DECISIONS: Final = ("CONTINUE", "PAUSE", "STOP", "NOOP")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What becomes of a trial that reported, and what a scheduler did to others with it."""

    decision: Decision
    why: str | None
    acts: tuple[Act, ...]
    save: bool = False
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """A configuration, and what of it was drawn or picked."""

    config: dict[str, Any]
    evaluated: dict[str, Any]


class Steering:
    """What a scheduler does to trials: it takes effect at once, and is kept for the journal.

    Args:
        history: the trials.
        removed: is told of a trial that is ended while it does not run.
    """

    def __init__(self, history: History, *, removed: Callable[[Trial], None]) -> None:
        self._history = history
        self._removed = removed
        self._acts: list[Act] = []
        self._saves: set[str] = set()

    def get_trials(self) -> Sequence[Trial]:
        return list(self._history.trials.values())

    def get_live_trials(self) -> Sequence[Trial]:
        return [trial for trial in self._history.live.values() if trial.ends_at is None]

    def pause_trial(self, trial: Trial) -> None:
        self._do(Act(do="pause", trial=trial.trial_id))

    def unpause_trial(self, trial: Trial) -> None:
        self._do(Act(do="unpause", trial=trial.trial_id))

    def stop_trial(self, trial: Trial) -> None:
        if trial.is_finished() or trial.ends_at is not None:  # whoever has to know of its end knows
            return
        runs = trial.status == RUNNING
        self._do(Act(do="stop", trial=trial.trial_id))
        if not runs:
            self._removed(trial)

    def save_trial(self, trial: Trial) -> None:
        self._saves.add(trial.trial_id)

    def exploit(
        self, trial: Trial, source: CheckpointRecord, config: Mapping[str, Any], evaluated: Mapping[str, Any]
    ) -> None:
        act = Act(
            do="exploit",
            trial=trial.trial_id,
            source=source.trial_id,
            checkpoint=source.name,
            config=plain(config),
            evaluated=shown(evaluated),
        )
        self._do(act)
        trial.config = dict(config)  # of what JSON does not hold there is only this

    def _do(self, act: Act) -> None:
        self._history.act((act,))
        self._acts.append(act)

    def take_saves(self) -> set[str]:
        """The ids of trials that are to save, since the last time."""
        saves, self._saves = self._saves, set()
        return saves

    def take(self) -> tuple[Act, ...]:
        """What was done since the last time."""
        acts, self._acts = tuple(self._acts), []
        return acts


class Decider:
    """Tells all three, and collects what they say.

    Args:
        history: the trials.
        searcher: who suggests.
        scheduler: who decides which trials go on.
        stopper: who ends trials.
        param_space: what suggestions are completed by.
    """

    def __init__(
        self,
        history: History,
        *,
        searcher: Searcher,
        scheduler: TrialScheduler,
        stopper: Stopper,
        param_space: Mapping[str, Any],
    ) -> None:
        self.steering = Steering(history, removed=self._removed)
        self.searcher = searcher
        self.scheduler = scheduler
        self.stopper = stopper
        self._param_space = param_space

    def suggest(self, trial_id: str, number: int) -> Suggestion | str | None:
        """The configuration of a new trial; None: not now; `Searcher.FINISHED`: no more.

        Raises:
            TuneError: the searcher gave something else.
            UsageError: it leaves a variable of `param_space` without a value.
        """
        found = self.searcher.suggest(trial_id)
        if found is None or found == Searcher.FINISHED:
            return None if found is None else Searcher.FINISHED
        if not isinstance(found, dict):
            raise TuneError(
                f"{type(self.searcher).__name__}.suggest returned {found!r:.200}; expected a dict, None or "
                "Searcher.FINISHED"
            )
        evaluated = self.searcher.evaluated(trial_id)
        whole = completed(self._param_space, found, by=type(self.searcher).__name__)
        config, drawn = self.scheduler.complete_config(number, whole)
        return Suggestion(
            config=config, evaluated={**(flat(found) if evaluated is None else evaluated), **drawn}
        )

    def messages(self) -> list[str]:
        """What they have to say since the last time."""
        said: list[str] = []
        for who in (self.searcher, self.scheduler, self.stopper):
            said += who.messages
            who.messages.clear()
        return said

    def added(self, trial: Trial) -> None:
        """A trial was made."""
        self.scheduler.on_trial_add(self.steering, trial)
        self._no_acts(trial)

    def resulted(self, trial: Trial, result: dict[str, Any], *, done: bool) -> Verdict:
        """A trial reported.

        Args:
            trial: it.
            result: what it reported.
            done: whether it ends with it by its own word.

        Returns:
            What becomes of it; with a `problem` if nobody can make anything of the result.
        """
        try:
            return self._decided(trial, result, done=done)
        except TrialError as error:
            self.steering.take_saves()
            return Verdict(decision="NOOP", why="refused", acts=self._taken(), problem=str(error))

    def _decided(self, trial: Trial, result: dict[str, Any], *, done: bool) -> Verdict:
        stops = self.stopper(trial.trial_id, result)  # told of the last result, too
        why = "done" if done else "stop" if stops else None
        decision: Decision
        if why is not None:
            self.scheduler.on_trial_complete(self.steering, trial, result)
            decision = "STOP"
        else:
            decision = self.scheduler.on_trial_result(self.steering, trial, result)
            if decision not in _DECISIONS:
                raise TuneError(
                    f"{type(self.scheduler).__name__}.on_trial_result returned {decision!r} for {trial}; "
                    f"allowed: {', '.join(_DECISIONS)}"
                )
            why = "scheduler" if decision == "STOP" else None
        if decision == "STOP":
            self.searcher.on_trial_complete(trial.trial_id, {**result, DONE: True})
        else:
            self.searcher.on_trial_result(trial.trial_id, result)
        save = trial.trial_id in self.steering.take_saves()
        return Verdict(decision=decision, why=why, acts=self._taken(), save=save)

    def completed(self, trial: Trial, *, again: bool = False) -> tuple[Act, ...]:
        """A trial's code came to its end.

        Args:
            trial: it.
            again: whether all were told before, and it ran on for the checkpoint that it ends with.
        """
        if again:
            return ()
        self.scheduler.on_trial_complete(self.steering, trial, trial.last_result)
        self.searcher.on_trial_complete(trial.trial_id, trial.last_result or None)
        return self._taken()

    def failed(self, trial: Trial) -> tuple[Act, ...]:
        """A trial failed for good; nobody is told that was told of its end before."""
        if trial.ends_at is not None:
            return ()
        self.scheduler.on_trial_error(self.steering, trial)
        self.searcher.on_trial_complete(trial.trial_id, None, error=True)
        return self._taken()

    def again(self, trial: Trial) -> None:
        """A trial that had ended is run again; `completed` and `failed` say when nobody is told."""
        if trial.ends_at is not None:
            return
        self.scheduler.on_trial_add(self.steering, trial)
        self._no_acts(trial)

    def _removed(self, trial: Trial) -> None:
        self.scheduler.on_trial_remove(self.steering, trial)

    def choose(self) -> Trial | None:
        """Which trial starts next."""
        return self.scheduler.choose_trial_to_run(self.steering)

    def _taken(self) -> tuple[Act, ...]:
        acts = self.steering.take()
        for act in acts:
            if act.do == "stop":
                self.searcher.on_trial_complete(act.trial, None)
        return acts

    def _no_acts(self, trial: Trial) -> None:
        if self.steering.take():
            raise TuneError(
                f"{type(self.scheduler).__name__}.on_trial_add did something to trials when {trial} was "
                "made; it may only do so when one reports or ends"
            )
