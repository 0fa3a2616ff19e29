"""Stoppers that see when nothing changes any more."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal

from keepstep.errors import UsageError
from keepstep.tune.stopper.base import Described
from keepstep.tune.stopper.measured import Missing, count, deviation, not_negative

__all__ = ["ExperimentPlateauStopper", "TrialPlateauStopper"]


class TrialPlateauStopper(Described):
    """Ends a trial whose metric does not change any more.

    Args:
        metric: which; nested ones by "a/b". Results without it don't count.
        std: the trial ends when the standard deviation of the newest values is at most this.
        num_results: how many values are looked at.
        grace_period: least number of results before a trial may end.
        metric_threshold: and the value must have come so far: at most this if `mode` is "min", at least this
            if it is "max". None: it may be any.
        mode: needed with `metric_threshold`.

    Raises:
        UsageError: an argument is none of these.
    """

    def __init__(
        self,
        metric: str,
        std: float = 0.01,
        num_results: int = 4,
        grace_period: int = 4,
        metric_threshold: float | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        own = "TrialPlateauStopper"
        if mode not in ("min", "max") and (metric_threshold is not None or mode is not None):
            raise UsageError(
                f'{own}.mode is {mode!r}; expected "min" or "max", which says on which side of '
                f"metric_threshold={metric_threshold!r} a trial may end"
            )
        self.metric = metric
        self.std = not_negative(f"{own}.std", std)
        self.num_results = count(f"{own}.num_results", num_results, least=1)
        self.grace_period = count(f"{own}.grace_period", grace_period, least=0)
        self.metric_threshold = metric_threshold
        self.mode = mode
        self._seen: dict[str, int] = {}
        self._newest: dict[str, deque[float]] = {}
        self._missing = Missing(f"{own} looks at", metric)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        value = self._missing.look_up(result, self.messages)
        self._seen[trial_id] = self._seen.get(trial_id, 0) + 1
        if value is None:
            return False
        newest = self._newest.setdefault(trial_id, deque(maxlen=self.num_results))
        newest.append(value)
        if self._seen[trial_id] < self.grace_period or len(newest) < self.num_results:
            return False
        return self._came_far(value) and deviation(newest) <= self.std

    def _came_far(self, value: float) -> bool:
        if self.metric_threshold is None:
            return True
        return value <= self.metric_threshold if self.mode == "min" else value >= self.metric_threshold


class ExperimentPlateauStopper(Described):
    """Ends the experiment when the best values of all trials don't change any more.

    Args:
        metric: which; nested ones by "a/b". Results without it don't count.
        std: the best values stand still while their standard deviation is at most this.
        top: how many of the best values are looked at.
        mode: "min" or "max": which ones are the best.
        patience: how many results in a row they may stand still before the experiment ends.

    Raises:
        UsageError: an argument is none of these.
    """

    def __init__(
        self,
        metric: str,
        std: float = 0.001,
        top: int = 10,
        mode: Literal["min", "max"] = "min",
        patience: int = 0,
    ) -> None:
        own = "ExperimentPlateauStopper"
        if mode not in ("min", "max"):
            raise UsageError(f'{own}.mode is {mode!r}; expected "min" or "max"')
        self.metric = metric
        self.std = not_negative(f"{own}.std", std)
        self.top = count(f"{own}.top", top, least=2)
        self.mode = mode
        self.patience = count(f"{own}.patience", patience, least=0)
        self._best: list[float] = []
        self._still = 0
        self._missing = Missing(f"{own} looks at", metric)

    def has_plateaued(self) -> bool:
        """Whether the best values stand still."""
        return len(self._best) == self.top and deviation(self._best) <= self.std

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        value = self._missing.look_up(result, self.messages)
        if value is not None:
            self._best = sorted([*self._best, value], reverse=self.mode == "max")[: self.top]
            self._still = self._still + 1 if self.has_plateaued() else 0
        return self.stop_all()

    def stop_all(self) -> bool:
        return self.has_plateaued() and self._still >= self.patience
