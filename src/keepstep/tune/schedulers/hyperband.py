"""HyperBand: trials wait for each other at rungs, and the best of them go on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, Literal

from keepstep.tune.experiment.trial import PAUSED, PENDING, Trial
from keepstep.tune.schedulers.arguments import check_flag, check_number
from keepstep.tune.schedulers.base import Controller, Decision
from keepstep.tune.schedulers.bracket import Bracket
from keepstep.tune.schedulers.measured import MeasuredScheduler

__all__ = ["HyperBandScheduler"]

_ROUNDING: Final = 1e-9
"""What a power may be off."""


class HyperBandScheduler(MeasuredScheduler):
    """Compares trials in brackets: at each rung all wait, and one of `reduction_factor` goes on.

    Brackets are filled in the order in which trials are made. A bracket with s rungs before the end takes
    `ceil((s_max + 1) / (s + 1) * reduction_factor ** s)` trials, and has its first rung at `max_t /
    reduction_factor ** s`; s goes from 0 to s_max, the logarithm of `max_t`, and then from 0 again. A trial
    that waits is paused, so that others have its resources.

    Source: L. Li et al., Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization, JMLR 18
    (2018).

    Args:
        time_attr: how far a trial has come (`MeasuredScheduler`).
        metric: None: what `TuneConfig` says.
        mode: None: what `TuneConfig` says.
        max_t: where trials end, in units of `time_attr`.
        reduction_factor: each rung lies so many times further than the one before, and one of so many trials
            gets past it.
        stop_last_trials: False: trials that got so far may run on behind `max_t`.

    Raises:
        UsageError: an argument is not allowed.
    """

    def __init__(
        self,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        max_t: float = 81,
        reduction_factor: float = 3,
        stop_last_trials: bool = True,
    ) -> None:
        super().__init__(time_attr, metric, mode)
        check_number(self, "max_t", max_t, least=1)
        check_number(self, "reduction_factor", reduction_factor, above=1)
        check_flag(self, "stop_last_trials", stop_last_trials)
        self.max_t = max_t
        self.reduction_factor = reduction_factor
        self.stop_last_trials = stop_last_trials
        self._brackets: list[Bracket] = []
        self._place_of: dict[str, int] = {}
        self._num_stopped = 0
        self._empty = self._empty_brackets()

    def _empty_brackets(self) -> Iterator[Bracket]:
        factor = self.reduction_factor
        most = round(math.log(self.max_t) / math.log(factor)) + 1
        while True:
            for s in range(most):
                first_rung = math.floor(self.max_t * factor**-s + _ROUNDING)
                if first_rung > 0:
                    size = math.ceil(most / (s + 1) * factor**s - _ROUNDING)
                    yield Bracket(size, first_rung, self.max_t, factor, s)

    def on_trial_add(self, tune_controller: Controller, trial: Trial) -> None:
        if trial.trial_id in self._place_of:
            return
        if not self._brackets or not self._brackets[-1].takes_more:
            self._brackets.append(next(self._empty))
        self._brackets[-1].add(trial.trial_id, trial.number)
        self._place_of[trial.trial_id] = len(self._brackets) - 1

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        time = self.time_of(trial, result)
        if time is None:
            return "CONTINUE"
        bracket = self._bracket_of(trial)
        if time >= self.max_t and self.stop_last_trials:
            self._num_stopped += 1
            self.leave(tune_controller, trial)
            return "STOP"
        if trial.trial_id not in bracket or time < bracket.rung or bracket.halvings == 0:
            return "CONTINUE"
        bracket.arrive(trial.trial_id, time, self.score_of(trial, result))
        return self._halve(tune_controller, bracket, trial)

    def _halve(self, tune_controller: Controller, bracket: Bracket, reporting: Trial | None) -> Decision:
        """Act on the trials of a bracket; the decision is of the one that reports."""
        halving = bracket.halve()
        self._num_stopped += len(halving.stop)
        waiting = {trial.trial_id: trial for trial in tune_controller.get_live_trials()}
        if reporting is not None:
            waiting.pop(reporting.trial_id, None)
        for trial_id in halving.stop:
            if trial_id in waiting:
                tune_controller.stop_trial(waiting[trial_id])
        for trial_id in halving.go_on:
            if trial_id in waiting and waiting[trial_id].status == PAUSED:
                tune_controller.unpause_trial(waiting[trial_id])
        if reporting is None or reporting.trial_id in halving.go_on:
            return "CONTINUE"
        return "STOP" if reporting.trial_id in halving.stop else self.pause(reporting)

    def leave(self, tune_controller: Controller, trial: Trial) -> None:
        bracket = self._bracket_of(trial)
        if trial.trial_id in bracket:
            bracket.remove(trial.trial_id)
            self._halve(tune_controller, bracket, None)

    def _bracket_of(self, trial: Trial) -> Bracket:
        return self._brackets[self._place_of[trial.trial_id]]

    def choose_trial_to_run(self, tune_controller: Controller) -> Trial | None:
        """The first trial of the earliest bracket that need not wait for others."""
        ready = [
            trial
            for trial in tune_controller.get_live_trials()
            if trial.status == PENDING
            or (trial.status == PAUSED and not self._bracket_of(trial).waits(trial.trial_id))
        ]
        return min(ready, key=lambda trial: (self._place_of[trial.trial_id], trial.number), default=None)

    def debug_string(self) -> str:
        there = [
            f"{len(bracket)} of {bracket.added} up to {bracket.rung:g}"
            for bracket in self._brackets
            if len(bracket)
        ]
        return f"{type(self).__name__}: {self._num_stopped} stopped; brackets: {', '.join(there) or 'none'}"
