"""Stoppers: which results end a trial, or the experiment."""

from __future__ import annotations

from keepstep.tune.stopper.base import CombinedStopper, NoopStopper, Stopper
from keepstep.tune.stopper.bounds import (
    DictionaryStopper,
    FunctionStopper,
    MaximumIterationStopper,
    TimeoutStopper,
)
from keepstep.tune.stopper.make import make_stopper
from keepstep.tune.stopper.plateau import ExperimentPlateauStopper, TrialPlateauStopper

__all__ = [
    "CombinedStopper",
    "DictionaryStopper",
    "ExperimentPlateauStopper",
    "FunctionStopper",
    "MaximumIterationStopper",
    "NoopStopper",
    "Stopper",
    "TimeoutStopper",
    "TrialPlateauStopper",
    "make_stopper",
]
