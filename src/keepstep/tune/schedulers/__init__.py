"""Which trials go on: schedulers by the names of `ray.tune.schedulers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepstep.lazy import lazy_names
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
# A scheduler's module is imported when it is asked for: what some of them need takes a while to load.
__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for name, module in CLASSES.items()}
)
