"""ASHA: trials are compared at rungs, without waiting for each other; bad ones are stopped there."""

from __future__ import annotations

import math
import random
from bisect import bisect_left, bisect_right, insort
from contextlib import suppress
from typing import Any, Final, Literal

from keepstep.errors import TrialError, UsageError
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.schedulers.arguments import check_flag, check_number
from keepstep.tune.schedulers.base import Controller, Decision
from keepstep.tune.schedulers.measured import MeasuredScheduler

__all__ = ["ASHAScheduler", "AsyncHyperBandScheduler"]

_ROUNDING: Final = 1e-9
"""What a logarithm may be off."""


class AsyncHyperBandScheduler(MeasuredScheduler):
    """Stops a trial at a rung unless it is among the best `1 / reduction_factor` of those that came there.

    Source: L. Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020
    (arXiv:1810.05934), in the variant that only stops trials and never pauses them.

    Args:
        time_attr: how far a trial has come (`MeasuredScheduler`).
        metric: None: what `TuneConfig` says.
        mode: None: what `TuneConfig` says.
        max_t: where trials end, in units of `time_attr`.
        grace_period: the first rung, in units of `time_attr`: no trial is stopped before.
        reduction_factor: each rung lies so many times further than the one before, and one of so many trials
            gets past it.
        brackets: groups of trials, drawn at random; group s has its first rung at `grace_period *
            reduction_factor ** s`.
        stop_last_trials: False: trials that got so far may run on behind `max_t`.

    Raises:
        UsageError: an argument is not allowed.
    """

    def __init__(
        self,
        time_attr: str = "training_iteration",
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        max_t: float = 100,
        grace_period: float = 1,
        reduction_factor: float = 4,
        brackets: int = 1,
        stop_last_trials: bool = True,
    ) -> None:
        super().__init__(time_attr, metric, mode)
        check_number(self, "max_t", max_t, above=0)
        check_number(self, "grace_period", grace_period, above=0)
        check_number(self, "reduction_factor", reduction_factor, above=1)
        check_number(self, "brackets", brackets, least=1, whole=True)
        check_flag(self, "stop_last_trials", stop_last_trials)
        if grace_period > max_t:
            raise UsageError(
                f"{type(self).__name__} got grace_period={grace_period!r} and max_t={max_t!r}; no trial "
                "would come to its first rung: grace_period must not be greater than max_t"
            )
        self.max_t = max_t
        self.grace_period = grace_period
        self.reduction_factor = reduction_factor
        self.brackets = brackets
        self.stop_last_trials = stop_last_trials
        self._rungs = [self._make_rungs(bracket) for bracket in range(brackets)]
        self._bracket_of: dict[int, int] = {}
        self._num_stopped = 0

    def _make_rungs(self, bracket: int) -> list[_Rung]:
        steps = math.log(self.max_t / self.grace_period) / math.log(self.reduction_factor)
        count = max(0, int(steps + _ROUNDING) + 1 - bracket)
        return [_Rung(self.grace_period * self.reduction_factor ** (k + bracket)) for k in range(count)]

    def _rungs_of(self, trial: Trial) -> list[_Rung]:
        """A trial's bracket, drawn by its number alone: the more rungs, the likelier."""
        if self.brackets == 1:
            return self._rungs[0]
        if trial.number not in self._bracket_of:
            weights = [math.exp(len(rungs) - len(self._rungs[0])) for rungs in self._rungs]
            generator = random.Random(f"bracket/{self.seed}/{trial.number}")  # noqa: S311
            self._bracket_of[trial.number] = generator.choices(range(self.brackets), weights)[0]
        return self._rungs[self._bracket_of[trial.number]]

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        time = self.time_of(trial, result)
        if time is None:
            return "CONTINUE"
        if time >= self.max_t and self.stop_last_trials:
            self._num_stopped += 1
            return "STOP"
        if self._passes(trial, time, result):
            return "CONTINUE"
        self._num_stopped += 1
        return "STOP"

    def on_trial_complete(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> None:
        with suppress(TrialError):  # The last result of a trial need not have the metric.
            time = self.time_of(trial, result)
            if time is not None:
                self._passes(trial, time, result)

    def _passes(self, trial: Trial, time: float, result: dict[str, Any]) -> bool:
        rungs = self._rungs_of(trial)
        reached = bisect_right(rungs, time, key=lambda rung: rung.time)
        if reached == 0 or trial.trial_id in rungs[reached - 1].trials:
            return True
        rung = rungs[reached - 1]
        score = self.score_of(trial, result)
        cutoff = rung.cutoff(1 - 1 / self.reduction_factor)
        rung.add(trial.trial_id, score)
        return cutoff is None or score >= cutoff

    def debug_string(self) -> str:
        rungs = [
            f"{rung.time:g}: {len(rung.trials)}" for rungs in self._rungs for rung in rungs if rung.trials
        ]
        shown = ", ".join(rungs) or "none"
        return f"{type(self).__name__}: {self._num_stopped} stopped; trials at rungs: {shown}"


ASHAScheduler = AsyncHyperBandScheduler


class _Rung:
    """What trials were worth when they came so far."""

    def __init__(self, time: float) -> None:
        self.time = time
        self.trials: set[str] = set()
        self._scores: list[float] = []

    def add(self, trial_id: str, score: float) -> None:
        self.trials.add(trial_id)
        insort(self._scores, score)

    def cutoff(self, fraction: float) -> float | None:
        """The score below which `fraction` of all lie, interpolated.

        What is infinite counts as the worst, or best, finite one. None: there is none.
        """
        scores = self._scores
        first = bisect_right(scores, -math.inf)
        last = bisect_left(scores, math.inf) - 1
        if last < first:
            return None
        place = fraction * (len(scores) - 1)
        low = min(max(math.floor(place), first), last)
        high = min(max(math.ceil(place), first), last)
        return scores[low] + (scores[high] - scores[low]) * (place - math.floor(place))
