"""Stoppers that compare: with bounds, by a function, by counting, by time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from inspect import signature
from numbers import Real
from typing import Any

from keepstep.errors import TuneError, UsageError
from keepstep.tune.result import TIME_SINCE_RESTORE, TIMESTAMP, look_up
from keepstep.tune.stopper.base import Described, Stopper
from keepstep.tune.stopper.measured import PATIENCE, count, leaves, names, positive, unknown

__all__ = ["DictionaryStopper", "FunctionStopper", "MaximumIterationStopper", "TimeoutStopper"]


class FunctionStopper(Described):
    """A function says which results end their trials.

    Args:
        function: takes (trial_id, result) and returns whether the trial ends. Nested metrics are there by
            "a/b", too. It must be a function of what it is told: after a restart it is told everything again.

    Raises:
        UsageError: it is no function, or takes something else.
    """

    def __init__(self, function: Callable[[str, dict[str, Any]], bool]) -> None:
        if not self.is_valid_function(function):
            raise UsageError(f"FunctionStopper takes a function; it was given {function!r:.200}")
        try:
            signature(function).bind("", {})
        except TypeError:
            raise UsageError(
                f"the function {function!r:.100}{signature(function)} cannot be called with (trial_id, "
                "result); expected one that takes these two and returns whether the trial ends"
            ) from None
        except ValueError:  # some functions of C don't tell
            pass
        self.function = function

    @classmethod
    def is_valid_function(cls, fn: object) -> bool:
        """Whether it is a function, rather than a stopper or none."""
        return callable(fn) and not isinstance(fn, Stopper | type)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        whole = {**result, **dict(leaves(result))}
        try:
            return bool(self.function(trial_id, whole))
        except Exception as error:
            name = getattr(self.function, "__qualname__", repr(self.function))
            raise TuneError(
                f"the function {name}, which says which trials end, raised {type(error).__name__}: "
                f"{error} on a result of trial {trial_id}, which has: {names(result)}"
            ) from error


class DictionaryStopper(Described):
    """Ends a trial with the first result in which a metric has reached its bound.

    Args:
        criteria: {metric: least value that ends the trial}; nested ones by "a/b".

    Raises:
        UsageError: a bound is no number, or the dict is nested.
    """

    def __init__(self, criteria: Mapping[str, Any]) -> None:
        for name, bound in criteria.items():
            if isinstance(bound, Mapping):
                inner = next(iter(bound), "...")
                raise UsageError(
                    f"stop has a dict at {name!r}; write nested metrics with slashes: "
                    f"{{'{name}/{inner}': ...}}"
                )
            if not isinstance(name, str) or not isinstance(bound, Real) or math.isnan(bound):
                raise UsageError(
                    f"stop says {name!r}: {bound!r:.100}; expected the name of a metric and a number: a "
                    "trial ends with the first result in which the metric has reached it"
                )
        self.criteria = dict(criteria)
        self._unseen = dict.fromkeys(self.criteria)
        self._left = PATIENCE

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        found = {name: look_up(result, name) for name in self.criteria}
        for name, value in found.items():
            if value is not None:
                self._unseen.pop(name, None)
        self._left -= 1
        if self._left == 0 and self._unseen:
            self.messages.append(unknown("stop names", list(self._unseen), result))
        return any(
            isinstance(found[name], Real) and bool(found[name] >= bound)
            for name, bound in self.criteria.items()
        )


class MaximumIterationStopper(Described):
    """Ends each trial after so many results.

    Args:
        max_iter: how many.

    Raises:
        UsageError: it is no whole number of at least 1.
    """

    def __init__(self, max_iter: int) -> None:
        self.max_iter = count("MaximumIterationStopper.max_iter", max_iter, least=1)
        self._seen: dict[str, int] = {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self._seen[trial_id] = self._seen.get(trial_id, 0) + 1
        return self._seen[trial_id] >= self.max_iter


class TimeoutStopper(Described):
    """Ends the experiment after so much time, counted from result to result.

    While nothing runs, between a kill and the restart, no time passes; and none is noticed to pass while
    nothing is reported. `TuneConfig.time_budget_s` looks at the clock instead.

    Args:
        timeout: seconds, or a `timedelta`.

    Raises:
        UsageError: it is neither, or not above 0.
    """

    def __init__(self, timeout: float | timedelta) -> None:
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        self.timeout_s = positive("TimeoutStopper.timeout in seconds, or as a timedelta,", seconds)
        self._passed_s = 0.0
        self._last: float | None = None

    def describe(self) -> dict[str, Any]:
        return {"timeout": self.timeout_s}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        now = result.get(TIMESTAMP)
        if now is not None:
            # A trial that has run for 3 s has not waited an hour for its result: the driver was away.
            ran_s = result.get(TIME_SINCE_RESTORE, math.inf if self._last is not None else 0.0)
            since_s = math.inf if self._last is None else max(0.0, now - self._last)
            self._passed_s += min(since_s, ran_s)
            self._last = now if self._last is None else max(now, self._last)
        return False

    def stop_all(self) -> bool:
        return self._passed_s >= self.timeout_s
