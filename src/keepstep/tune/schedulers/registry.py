"""Names of schedulers -> classes. A scheduler's module is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.schedulers.base import TrialScheduler

__all__ = ["CLASSES", "class_of", "create_scheduler"]

CLASSES: Final[Mapping[str, str]] = {
    "ASHAScheduler": "async_hyperband",
    "AsyncHyperBandScheduler": "async_hyperband",
    "FIFOScheduler": "base",
    "HyperBandScheduler": "hyperband",
    "MedianStoppingRule": "median_stopping_rule",
    "PB2": "pb2",
    "PopulationBasedTraining": "pbt",
    "PopulationBasedTrainingReplay": "pbt_replay",
}
"""{class: its module, in this package}."""

_NAMES: Final[Mapping[str, str]] = {
    "fifo": "FIFOScheduler",
    "async_hyperband": "AsyncHyperBandScheduler",
    "asynchyperband": "AsyncHyperBandScheduler",
    "asha": "AsyncHyperBandScheduler",
    "hyperband": "HyperBandScheduler",
    "median_stopping_rule": "MedianStoppingRule",
    "medianstopping": "MedianStoppingRule",
    "pbt": "PopulationBasedTraining",
    "pbt_replay": "PopulationBasedTrainingReplay",
    "pb2": "PB2",
}


def class_of(name: str) -> type[TrialScheduler]:
    """The class of this name."""
    found: type[TrialScheduler] = getattr(import_module(f"keepstep.tune.schedulers.{CLASSES[name]}"), name)
    return found


def create_scheduler(scheduler: str, **kwargs: Any) -> TrialScheduler:
    """A scheduler by name.

    Args:
        scheduler: "fifo", "async_hyperband" (also "asha"), "hyperband", "median_stopping_rule", "pbt",
            "pbt_replay" or "pb2".
        kwargs: its arguments.

    Raises:
        UsageError: there is none of that name, or it has no such argument.
    """
    name = _NAMES.get(scheduler.lower()) if isinstance(scheduler, str) else None
    if name is None:
        raise UsageError(f"there is no scheduler {scheduler!r}; allowed: {', '.join(sorted(_NAMES))}")
    kind = class_of(name)
    allowed = list(signature(kind).parameters)
    unknown = [argument for argument in kwargs if argument not in allowed]
    if unknown:
        raise UsageError(
            f"{name} has no argument {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed) or 'none'}"
        )
    return kind(**kwargs)
