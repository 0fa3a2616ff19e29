"""What a script may ask about its process: which rank it is, on which device, in which kind of run.

`PartialState()` may be made anywhere and as often as one likes: the ranks of a run are joined once, and
every instance shows the same. `Accelerator` makes one.
"""

from __future__ import annotations

import enum
import os
from datetime import timedelta
from typing import Any

import torch

from keepstep.errors import UsageError
from keepstep.track import here
from keepstep.train.ranks.control import ProcessControl
from keepstep.train.settings.environment import Environment, Launched, read_environment
from keepstep.world import DEFAULT_TIMEOUT_S, OneRank, World, join_ranks, joined_group, leave_ranks

__all__ = ["DistributedType", "PartialState", "current_world", "device_of", "join_world"]


class DistributedType(enum.StrEnum):
    """How the processes of a run work together; names and values are Accelerate's.

    keepstep trains with NO, MULTI_CPU, MULTI_GPU and FSDP. The others are there for scripts that compare
    with them.
    """

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_NPU = "MULTI_NPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_XPU = "MULTI_XPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_NEURON = "MULTI_NEURON"
    DEEPSPEED = "DEEPSPEED"
    FSDP = "FSDP"
    XLA = "XLA"
    TPU = "XLA"
    MEGATRON_LM = "MEGATRON_LM"


_joined: dict[Any, World] = {}
"""The ranks of this process, by what they were joined with: a fork, or a new launch, joins anew."""


def join_world(
    environment: Environment, *, cpu: bool, backend: str | None = None, timeout: timedelta | None = None
) -> World:
    """Meet the other processes that a launcher started; once in a process.

    Args:
        environment: where this process stands.
        cpu: train on the CPU even if there is an accelerator.
        backend: of torch.distributed; None for gloo, and NCCL beside it on GPUs.
        timeout: how long to wait for other ranks; None for ten minutes.
    """
    launched = environment.launched
    key = (os.getpid(), launched, joined_group())
    if key not in _joined:
        world = _join(launched, cpu=cpu, backend=backend, timeout=timeout)
        _joined.clear()
        key = (os.getpid(), launched, joined_group())
        _joined[key] = world
    here.settle(_joined[key])
    return _joined[key]


def current_world() -> World:
    """The ranks of this process, joined if they have not been; cheaper than `PartialState().world`."""
    for (process, _, group), world in _joined.items():
        if process == os.getpid() and group == joined_group():
            return world
    return PartialState().world


def _join(launched: Launched | None, *, cpu: bool, backend: str | None, timeout: timedelta | None) -> World:
    if launched is None and joined_group() is None:
        return OneRank()
    on_gpus = not cpu and torch.cuda.is_available()
    if on_gpus and launched is not None:
        torch.cuda.set_device(_ordinal(launched.local_rank, torch.cuda.device_count()))
    return join_ranks(
        backend=backend or ("cpu:gloo,cuda:nccl" if on_gpus else "gloo"),
        timeout_s=DEFAULT_TIMEOUT_S if timeout is None else timeout.total_seconds(),
        local_rank=None if launched is None else launched.local_rank,
        local_size=None if launched is None else launched.local_size,
    )


def device_of(world: World, *, cpu: bool) -> torch.device:
    """The device that a rank trains on.

    Args:
        world: its place among the others.
        cpu: the CPU even if there is an accelerator.

    Raises:
        UsageError: there are more ranks on this machine than devices.
    """
    found = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, _ordinal(world.local_rank, torch.accelerator.device_count()))


def _ordinal(local_rank: int, devices: int) -> int:
    if local_rank >= devices:
        raise UsageError(
            f"This is process {local_rank} on its machine (from 0), which has {devices} accelerators; each "
            f"process needs one of its own. Start at most {devices} processes, or train on the CPU "
            "(cpu=True)."
        )
    return local_rank


class PartialState(ProcessControl):
    """This process among those that run together.

    Args:
        cpu: train on the CPU even if there is an accelerator.
        backend: of torch.distributed; None for gloo, and NCCL beside it on GPUs.
        timeout: how long to wait for other ranks; None for ten minutes.

    Attributes:
        device: what this process trains on.
        debug: whether KEEPSTEP_DEBUG_MODE is set.
    """

    def __init__(
        self, cpu: bool = False, *, backend: str | None = None, timeout: timedelta | None = None
    ) -> None:
        environment = read_environment()
        cpu = cpu or environment.use_cpu
        self._world = join_world(environment, cpu=cpu, backend=backend, timeout=timeout)
        self.device = device_of(self._world, cpu=cpu)
        self.debug = environment.debug

    @property
    def world(self) -> World:
        """The ranks."""
        return self._world

    @property
    def distributed_type(self) -> DistributedType:
        """How ranks work together."""
        return DistributedType(self._world.kind)

    @property
    def default_device(self) -> torch.device:
        """The kind of device that this machine trains on, whatever was asked for."""
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else torch.device(found.type)

    @property
    def initialized(self) -> bool:
        """True: an instance knows its process."""
        return True

    def destroy_process_group(self) -> None:
        """Leave the other ranks, at the end of a script."""
        leave_ranks()

    def __repr__(self) -> str:
        return (
            f"Distributed environment: {self.distributed_type}\n"
            f"Num processes: {self.num_processes}\n"
            f"Process index: {self.process_index}\n"
            f"Local process index: {self.local_process_index}\n"
            f"Device: {self.device}\n"
        )
