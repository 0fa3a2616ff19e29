"""Wishes and the environment -> parts. Nothing below this module parses any of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.place.registry import is_address
from keepstep.errors import UsageError
from keepstep.train.placement import LeaveInPlace, MoveTo, Placement
from keepstep.train.precision import BFloat16, Float16, FullPrecision, Precision
from keepstep.train.ranks.parallel import Alone, Copies, Parallel
from keepstep.train.ranks.process import PartialState
from keepstep.train.settings.config import (
    CheckpointPolicy,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from keepstep.train.settings.environment import Environment, read_environment
from keepstep.train.settings.handlers import Handlers, compiling_of, sharding_of
from keepstep.train.settings.plugins import (
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    ProfileKwargs,
    TorchDynamoPlugin,
)

__all__ = ["Parts", "Wishes", "build_parts"]

_log = logging.getLogger(__name__)
_PRECISIONS = ("no", "bf16", "fp16")
_NOT_THERE = {
    "deepspeed_plugin": "DeepSpeed",
    "deepspeed_plugins": "DeepSpeed",
    "megatron_lm_plugin": "Megatron-LM",
    "torch_tp_plugin": "tensor parallelism",
    "parallelism_config": "meshes of several dimensions",
}
_KINDS: dict[str, type] = {
    "device_placement": bool,
    "cpu": bool,
    "step_scheduler_with_optimizer": bool,
    "checkpoint_policy": CheckpointPolicy,
    "dataloader_config": DataLoaderConfiguration,
    "dynamo_plugin": TorchDynamoPlugin,
    "fsdp_plugin": FullyShardedDataParallelPlugin,
    "gradient_accumulation_plugin": GradientAccumulationPlugin,
    "project_config": ProjectConfiguration,
}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The arguments of `Accelerator`, as they were given."""

    device_placement: bool
    split_batches: bool
    dispatch_batches: bool | None
    even_batches: bool
    mixed_precision: str | None
    gradient_accumulation_steps: int
    cpu: bool
    deepspeed_plugin: Any
    fsdp_plugin: FullyShardedDataParallelPlugin | None
    torch_tp_plugin: Any
    megatron_lm_plugin: Any
    rng_types: Sequence[str] | None
    deepspeed_plugins: Any
    parallelism_config: Any
    dynamo_backend: DynamoBackend | str | None
    dynamo_plugin: TorchDynamoPlugin | None
    dataloader_config: DataLoaderConfiguration | None
    project_dir: str | os.PathLike[str] | None
    project_config: ProjectConfiguration | None
    gradient_accumulation_plugin: GradientAccumulationPlugin | None
    step_scheduler_with_optimizer: bool
    kwargs_handlers: list[Any] | None
    checkpoint_policy: CheckpointPolicy | None
    log_with: Any


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an Accelerator is made of."""

    wishes: Wishes
    process: PartialState
    parallel: Parallel
    compiling: TorchDynamoPlugin
    profiling: ProfileKwargs
    precision: Precision
    placement: Placement
    loading: DataLoaderConfiguration
    accumulation: GradientAccumulationPlugin
    project: ProjectConfiguration
    policy: CheckpointPolicy
    retention: Retention
    pin_explicit_saves: bool


def build_parts(wishes: Wishes) -> Parts:
    """Choose the parts that an Accelerator forwards to.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """
    policy = wishes.checkpoint_policy
    _check_kinds(wishes)
    _refuse_what_there_is_not(wishes)
    environment = read_environment()
    loading = _loading(wishes)
    project = _project(wishes.project_dir, wishes.project_config)
    accumulation = _accumulation(wishes, environment)
    compiling = _compiling(wishes, environment)
    sharding = wishes.fsdp_plugin or (sharding_of(environment.fsdp) if environment.use_fsdp else None)
    handlers = Handlers.of(wishes.kwargs_handlers or [])
    process = PartialState(
        cpu=wishes.cpu, backend=handlers.process_group.backend, timeout=handlers.process_group.timeout
    )
    name = environment.mixed_precision if wishes.mixed_precision is None else wishes.mixed_precision
    precision = _precision(str(name or "no"), process.device, handlers)
    return Parts(
        wishes=wishes,
        process=process,
        parallel=_parallel(process, sharding, handlers, precision),
        compiling=compiling,
        profiling=handlers.profiling,
        precision=precision,
        placement=_placement(process.device, wishes.device_placement, loading),
        loading=loading,
        accumulation=accumulation,
        project=project,
        policy=policy or CheckpointPolicy(),
        retention=_retention(project, policy),
        # With no word on what to keep, what the user saves by hand stays, as in Accelerate; what is saved
        # automatically must not fill the disk.
        pin_explicit_saves=project.total_limit is None and policy is None,
    )


def _check_kinds(wishes: Wishes) -> None:
    for name, kind in _KINDS.items():
        value = getattr(wishes, name)
        if value is not None and not isinstance(value, kind):
            wanted = "True or False" if kind is bool else f"a {kind.__name__} of keepstep's"
            raise UsageError(
                f"{name} is {value!r:.100}, a {type(value).__module__}.{type(value).__qualname__}; expected "
                f"{wanted}."
            )


def _refuse_what_there_is_not(wishes: Wishes) -> None:
    for name, package in _NOT_THERE.items():
        if getattr(wishes, name) is not None:
            raise UsageError(
                f"{name} was given, but keepstep has no backend for {package}. Leave it out; to shard a "
                "model over the ranks use fsdp_plugin=FullyShardedDataParallelPlugin(...)."
            )


def _parallel(
    process: PartialState,
    sharding: FullyShardedDataParallelPlugin | None,
    handlers: Handlers,
    precision: Precision,
) -> Parallel:
    if sharding is not None and not process.use_distributed:
        _log.warning("fsdp_plugin was given, but there is one process: the model is not sharded.")
    if not process.use_distributed:
        return Alone()
    if sharding is not None:
        shards: Parallel = import_module("keepstep.train.ranks.shards").Shards(sharding, precision.dtype)
        return shards
    return Copies(process.distributed_type, handlers.copies)


def _compiling(wishes: Wishes, environment: Environment) -> TorchDynamoPlugin:
    if wishes.dynamo_plugin is not None:
        if wishes.dynamo_backend is not None:
            raise UsageError("dynamo_backend and dynamo_plugin were both given. Leave out dynamo_backend.")
        return wishes.dynamo_plugin
    if wishes.dynamo_backend is not None:
        return TorchDynamoPlugin(backend=wishes.dynamo_backend)
    return compiling_of(environment.dynamo)


def _precision(name: str, device: torch.device, handlers: Handlers) -> Precision:
    if name == "no":
        return FullPrecision()
    if name == "bf16":
        return BFloat16(device.type, handlers.autocasting)
    if name == "fp16":
        return Float16(device.type, handlers.autocasting, handlers.scaling.to_kwargs())
    if name == "fp8":
        raise UsageError(
            "mixed_precision='fp8' needs a GPU with 8-bit units and a backend for its layers (torchao or "
            f"TransformerEngine), and keepstep has none yet. Use one of {', '.join(_PRECISIONS)}."
        )
    raise UsageError(f"mixed_precision={name!r}; it must be one of {', '.join(_PRECISIONS)}.")


def _placement(device: torch.device, wanted: bool, loading: DataLoaderConfiguration) -> Placement:
    if not wanted or device.type == "cpu":
        return LeaveInPlace()
    return MoveTo(device, non_blocking=loading.non_blocking)


def _loading(wishes: Wishes) -> DataLoaderConfiguration:
    """The Accelerator's own arguments and the configuration say the same, or one of them nothing."""
    default = DataLoaderConfiguration()
    config = wishes.dataloader_config or default
    given = {name: getattr(wishes, name) for name in ("split_batches", "dispatch_batches", "even_batches")}
    for name, value in given.items():
        usual, configured = getattr(default, name), getattr(config, name)
        if value not in (usual, configured) and configured != usual:
            raise UsageError(
                f"Accelerator({name}={value!r}) and DataLoaderConfiguration({name}={configured!r}) differ. "
                "Leave one of them out."
            )
        if value != usual:
            config = replace(config, **{name: value})
    return config


def _accumulation(wishes: Wishes, environment: Environment) -> GradientAccumulationPlugin:
    steps, plugin = wishes.gradient_accumulation_steps, wishes.gradient_accumulation_plugin
    if plugin is None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UsageError(f"gradient_accumulation_steps={steps!r}; it must be an integer of at least 1.")
        from_environment = environment.gradient_accumulation_steps if steps == 1 else None
        return GradientAccumulationPlugin(num_steps=from_environment or steps)
    if steps != 1:
        raise UsageError(
            f"gradient_accumulation_steps={steps} and gradient_accumulation_plugin "
            f"(num_steps={plugin.num_steps}) were both given. Leave out gradient_accumulation_steps."
        )
    return plugin


def _place(path: str | os.PathLike[str]) -> str | Path:
    return os.fspath(path) if is_address(path) else Path(path)


def _project(
    project_dir: str | os.PathLike[str] | None, config: ProjectConfiguration | None
) -> ProjectConfiguration:
    if config is None:
        return ProjectConfiguration(project_dir=None if project_dir is None else _place(project_dir))
    if project_dir is None or config.project_dir == project_dir:
        return config
    if config.project_dir is not None:
        raise UsageError(
            f"project_dir={os.fspath(project_dir)!r} and ProjectConfiguration(project_dir="
            f"{os.fspath(config.project_dir)!r}) differ. Leave one of them out."
        )
    return replace(config, project_dir=_place(project_dir))


def _retention(project: ProjectConfiguration, policy: CheckpointPolicy | None) -> Retention:
    limit = project.total_limit
    if policy is None:
        return Retention(keep_last=3 if limit is None else limit)
    if limit is not None and policy.keep_last is not None and policy.keep_last != limit:
        raise UsageError(
            f"ProjectConfiguration(total_limit={limit}) and CheckpointPolicy(keep_last={policy.keep_last}) "
            "say different things about how many checkpoints to keep. Leave one of them out."
        )
    return Retention(
        keep_last=policy.keep_last if limit is None else limit,
        keep_best=policy.keep_best,
        keep_every_n_steps=policy.keep_every_n_steps,
        keep_within_s=policy.keep_within_s,
        byte_budget=policy.byte_budget,
    )
