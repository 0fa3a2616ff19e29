"""An experiment: its trials and its journal."""

from __future__ import annotations

from keepstep.tune.experiment.trial import Trial

__all__ = ["Trial"]
