"""Which trial is best; pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from keepstep.errors import UsageError
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.result import DEFAULT_METRIC, look_up

__all__ = ["SCOPES", "best_trial", "checked", "number", "score"]

SCOPES: Final = ("last", "all", "avg", "last-5-avg", "last-10-avg")
_LAST: Final = {"last-5-avg": 5, "last-10-avg": 10}

Results = Callable[[Trial], Sequence[Mapping[str, Any]]]


def number(value: Any) -> float | None:
    """A metric's value, if it is a number; NaN is one."""
    return float(value) if isinstance(value, int | float) else None


def checked(
    metric: str | None, mode: str | None, scope: str, *, asked: str
) -> tuple[str, Literal["min", "max"]]:
    """What to look at, and which way is better.

    Args:
        metric: None with a mode: that of a trial that reports a bare number.
        mode: "min" or "max".
        scope: one of `SCOPES`.
        asked: the method, for messages.

    Raises:
        UsageError: it was not said, or is none of these.
    """
    if scope not in SCOPES:
        raise UsageError(f"{asked}(scope={scope!r}); expected one of {', '.join(map(repr, SCOPES))}")
    if mode is None and metric is None:
        raise UsageError(
            f'{asked} does not know by what: pass metric="..." and mode="min" or "max", or give them to '
            "TuneConfig"
        )
    if mode != "min" and mode != "max":
        said = f"mode={mode!r}" if mode is not None else "no mode"
        raise UsageError(f'{asked} was given {said}; expected "min" or "max", here or in TuneConfig')
    return metric if metric is not None else DEFAULT_METRIC, "min" if mode == "min" else "max"


def score(
    trial: Trial, metric: str, mode: Literal["min", "max"], scope: str, results: Results
) -> float | None:
    """What a trial counts for: a number, None if it never reported one.

    Args:
        trial: which.
        metric: nested ones by "a/b".
        mode: for the scope "all".
        scope: "last": its newest result; "all": its best; "avg", "last-5-avg", "last-10-avg": the mean of
            all or the last results that have the metric.
        results: reads all of a trial's; not asked for "last".
    """
    if scope == "last":
        return number(trial.metric(metric))
    values = [number(look_up(result, metric)) for result in results(trial)]
    found = [value for value in values if value is not None]
    if not found:
        return None
    if scope == "all":
        sound = [value for value in found if not math.isnan(value)] or found
        return max(sound) if mode == "max" else min(sound)
    last = found[-_LAST.get(scope, len(found)) :]
    return sum(last) / len(last)


def best_trial(
    trials: Sequence[Trial],
    metric: str,
    mode: Literal["min", "max"],
    scope: str,
    results: Results,
    *,
    only_finite: bool,
) -> Trial | None:
    """The best, the first of equals; None if none has the metric.

    Args:
        trials: to choose from.
        metric: nested ones by "a/b".
        mode: "min" or "max".
        scope: as `score` has it.
        results: reads all results of a trial.
        only_finite: trials whose score is NaN or infinite don't count; otherwise NaN is worst.
    """
    best: Trial | None = None
    best_rank = (-1, 0.0)
    for trial in trials:
        value = score(trial, metric, mode, scope, results)
        if value is None or (only_finite and not math.isfinite(value)):
            continue
        rank = (0, 0.0) if math.isnan(value) else (1, value if mode == "max" else -value)
        if best is None or rank > best_rank:
            best, best_rank = trial, rank
    return best
