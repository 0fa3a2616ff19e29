"""Trials that never were as good as the median of the others on average are stopped."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from keepstep.tune.experiment.trial import PAUSED, PENDING, Trial
from keepstep.tune.schedulers.arguments import check_flag, check_number
from keepstep.tune.schedulers.base import Controller, Decision
from keepstep.tune.schedulers.measured import MeasuredScheduler

__all__ = ["MedianStoppingRule"]


class MedianStoppingRule(MeasuredScheduler):
    """Stops a trial whose best result is worse than the median of what the others had on average up to then.

    Source: D. Golovin et al., Google Vizier: A Service for Black-Box Optimization, KDD 2017.

    Args:
        time_attr: how far a trial has come (`MeasuredScheduler`).
        metric: None: what `TuneConfig` says.
        mode: None: what `TuneConfig` says.
        grace_period: no trial is stopped before, and no result before is averaged; in units of `time_attr`.
        min_samples_required: of how many other trials that came as far there must be, at least, to compare
            with.
        min_time_slice: while there are fewer, a trial makes room for those that wait when it has run so long;
            in units of `time_attr`.
        hard_stop: False: trials are paused instead, and go on when nothing else waits; then to their end.

    Raises:
        UsageError: an argument is not allowed.
    """

    def __init__(
        self,
        time_attr: str = "time_total_s",
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        grace_period: float = 60.0,
        min_samples_required: int = 3,
        min_time_slice: float = 0,
        hard_stop: bool = True,
    ) -> None:
        super().__init__(time_attr, metric, mode)
        check_number(self, "grace_period", grace_period, least=0)
        check_number(self, "min_samples_required", min_samples_required, least=1, whole=True)
        check_number(self, "min_time_slice", min_time_slice, least=0)
        check_flag(self, "hard_stop", hard_stop)
        self.grace_period = grace_period
        self.min_samples_required = min_samples_required
        self.min_time_slice = min_time_slice
        self.hard_stop = hard_stop
        self._curves: dict[str, _Curve] = {}
        self._num_stopped = 0

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        time = self.time_of(trial, result)
        curve = self._curves.setdefault(trial.trial_id, _Curve())
        if time is None or curve.condemned:
            return "CONTINUE"
        curve.add(time, self.score_of(trial, result), counts=time >= self.grace_period)
        if time < self.grace_period:
            return "CONTINUE"
        means = [other.mean_until(time) for other in self._curves.values() if other is not curve]
        samples = [mean for mean in means if mean is not None]
        if len(samples) < self.min_samples_required:
            return self._make_room(tune_controller, trial, curve, time)
        if curve.best >= median(samples):
            return "CONTINUE"
        curve.condemned = True
        self._num_stopped += 1
        return "STOP" if self.hard_stop else self.pause(trial)

    def _make_room(self, tune_controller: Controller, trial: Trial, curve: _Curve, time: float) -> Decision:
        """Too few trials to compare with: others get their turn."""
        if time - curve.paused_at <= self.min_time_slice:
            return "CONTINUE"
        if not any(other.status in (PENDING, PAUSED) for other in tune_controller.get_live_trials()):
            return "CONTINUE"
        curve.paused_at = time
        return self.pause(trial)

    def choose_trial_to_run(self, tune_controller: Controller) -> Trial | None:
        """What was interrupted, then new ones, then those that came least far, then those that are bad."""
        waiting = [trial for trial in tune_controller.get_live_trials() if trial.status in (PENDING, PAUSED)]
        return min(waiting, key=self._turn, default=None)

    def _turn(self, trial: Trial) -> tuple[bool, bool, bool, float, int]:
        curve = self._curves.get(trial.trial_id, _Curve())
        first = not self.interrupted(trial)
        return (first, curve.condemned, trial.status == PAUSED, curve.paused_at, trial.number)

    def debug_string(self) -> str:
        return f"{type(self).__name__}: {self._num_stopped} {'stopped' if self.hard_stop else 'set back'}"


@dataclass(slots=True)
class _Curve:
    """What a trial reported.

    Attributes:
        times: of the results that count: behind the grace period, with finite scores.
        sums: of all scores up to each of them.
        best: of all scores.
        last: time of the last result.
        condemned: whether it was found to be bad.
        paused_at: when it last made room; before the first time: at minus infinity.
    """

    times: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    best: float = -math.inf
    last: float = -math.inf
    condemned: bool = False
    paused_at: float = -math.inf

    def add(self, time: float, score: float, counts: bool) -> None:
        self.best = max(self.best, score)
        self.last = max(self.last, time)
        if counts and math.isfinite(score):
            self.times.append(time)
            self.sums.append((self.sums[-1] if self.sums else 0.0) + score)

    def mean_until(self, time: float) -> float | None:
        """Of a trial that came as far: the mean of its scores up to then. None: it did not, or had none."""
        place = bisect_right(self.times, time)
        if self.last < time or place == 0:
            return None
        return self.sums[place - 1] / place
