"""What all faces of the Accelerator forward to."""

from __future__ import annotations

import torch

from keepstep.track.trackers import Trackers
from keepstep.train.build import Parts
from keepstep.train.precision import Precision
from keepstep.train.preparing import Preparer
from keepstep.train.ranks.parallel import Parallel
from keepstep.train.ranks.process import PartialState
from keepstep.train.resuming.saving import Saver
from keepstep.train.resuming.state import TrainState
from keepstep.train.settings.config import ProjectConfiguration
from keepstep.train.states import AcceleratorState, GradientState
from keepstep.train.step import AccumulationWindow
from keepstep.world import World

__all__ = ["Facade"]


class Facade:
    """The parts of one run.

    Attributes:
        device: what this rank trains on.
        project_configuration: where the project keeps its files.
        split_batches: see `Accelerator`.
        process: this process among the others.
        state: the set-up of the run.
        gradient_state: where the run stands between two optimizer steps.
    """

    device: torch.device
    project_configuration: ProjectConfiguration
    split_batches: bool
    process: PartialState
    state: AcceleratorState
    gradient_state: GradientState
    _parts: Parts
    _world: World
    _parallel: Parallel
    _precision: Precision
    _window: AccumulationWindow
    _state: TrainState
    _preparer: Preparer
    _saver: Saver
    _trackers: Trackers
    _triggered: bool = False
