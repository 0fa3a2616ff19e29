"""Metrics in results, and metrics that are not there; checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.result import AUTOMATIC_FIELDS, look_up

__all__ = [
    "PATIENCE",
    "Missing",
    "count",
    "deviation",
    "leaves",
    "names",
    "not_negative",
    "positive",
    "unknown",
]

PATIENCE: Final = 20
"""Results without a metric, before people are told that there is none."""


class Missing:
    """A metric that may never be reported, which is said once.

    Args:
        who: looks at it, for people.
        metric: which.
    """

    def __init__(self, who: str, metric: str) -> None:
        if not isinstance(metric, str) or not metric:
            raise UsageError(f"{who} metric={metric!r}; expected the name of a metric")
        self._who = who
        self._metric = metric
        self._left: int | None = PATIENCE

    def look_up(self, result: Mapping[str, Any], messages: list[str]) -> float | None:
        """The value; None if there is none, or it is NaN or no number."""
        value = look_up(result, self._metric)
        if isinstance(value, Real) and not math.isnan(value):
            self._left = None
            return float(value)
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                messages.append(unknown(self._who, [self._metric], result))
        return None


def unknown(who: str, metrics: Sequence[str], result: Mapping[str, Any]) -> str:
    """What to say of metrics that were never reported."""
    shown = ", ".join(map(repr, metrics))
    return (
        f"{who} {shown}, and none of the first {PATIENCE} results has "
        f"{'it' if len(metrics) == 1 else 'them'}; they have: {names(result)}"
    )


def leaves(result: Mapping[str, Any], outer: str = "") -> Iterable[tuple[str, Any]]:
    """The metrics of a result, nested ones by "a/b"."""
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{outer}{name}/")
        else:
            yield f"{outer}{name}", value


def names(result: Mapping[str, Any]) -> str:
    """The metrics that a trial reported by itself, for people."""
    known = [name for name, _ in leaves(result) if name not in AUTOMATIC_FIELDS]
    return ", ".join(known[:20]) or "nothing of their own"


def deviation(values: Iterable[float]) -> float:
    """The standard deviation of values as they are, not of what they were drawn from; infinite ones: inf."""
    known = list(values)
    if not all(map(math.isfinite, known)):
        return math.inf
    mean = math.fsum(known) / len(known)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in known) / len(known))


def count(name: str, value: object, *, least: int) -> int:
    """A whole number.

    Raises:
        UsageError: it is none, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return value


def positive(name: str, value: object) -> float:
    """A number > 0.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) > 0:
        raise UsageError(f"{name} is {value!r}; expected a number > 0")
    return float(value)


def not_negative(name: str, value: object) -> float:
    """A number >= 0.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not float(value) >= 0:
        raise UsageError(f"{name} is {value!r}; expected a number >= 0")
    return float(value)
