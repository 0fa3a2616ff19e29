"""What a trial runs: a function or a class, and what it may ask for."""

from __future__ import annotations

from keepstep.tune.trainable.parameters import with_parameters
from keepstep.tune.trainable.resources import with_resources
from keepstep.tune.trainable.trainable import Trainable

__all__ = ["Trainable", "with_parameters", "with_resources"]
