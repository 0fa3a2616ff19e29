"""What scripts import from `accelerate.state`."""

from keepstep.train.ranks.process import PartialState
from keepstep.train.states import AcceleratorState, GradientState

__all__ = ["AcceleratorState", "GradientState", "PartialState"]
