"""Which trials go on: schedulers by the names of `ray.tune.schedulers`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keepstep.tune.schedulers.base import FIFOScheduler as FIFOScheduler
from keepstep.tune.schedulers.base import TrialScheduler as TrialScheduler
from keepstep.tune.schedulers.registry import CLASSES
from keepstep.tune.schedulers.registry import create_scheduler as create_scheduler

if TYPE_CHECKING:
    from keepstep.tune.schedulers.async_hyperband import ASHAScheduler as ASHAScheduler
    from keepstep.tune.schedulers.async_hyperband import AsyncHyperBandScheduler as AsyncHyperBandScheduler
    from keepstep.tune.schedulers.hyperband import HyperBandScheduler as HyperBandScheduler
    from keepstep.tune.schedulers.median_stopping_rule import MedianStoppingRule as MedianStoppingRule
    from keepstep.tune.schedulers.pb2 import PB2 as PB2
    from keepstep.tune.schedulers.pbt import PopulationBasedTraining as PopulationBasedTraining
    from keepstep.tune.schedulers.pbt_replay import (
        PopulationBasedTrainingReplay as PopulationBasedTrainingReplay,
    )

__all__ = sorted([*CLASSES, "TrialScheduler", "create_scheduler"])  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """A scheduler's module is imported when it is asked for: what some of them need takes a while to load."""
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there is: {', '.join(__all__)}")
    found = getattr(import_module(f"{__name__}.{CLASSES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
