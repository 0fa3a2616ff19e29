"""Wishes and the environment -> parts. Nothing below this module parses any of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.place.registry import is_address
from keepstep.errors import UsageError
from keepstep.train.config import (
    CheckpointPolicy,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    ProjectConfiguration,
)
from keepstep.train.environment import Environment, read_environment
from keepstep.train.placement import LeaveInPlace, MoveTo, Placement
from keepstep.train.precision import BFloat16, Float16, FullPrecision, Precision
from keepstep.train.process import PartialState

__all__ = ["Parts", "Wishes", "build_parts"]

_PRECISIONS = ("no", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The arguments of `Accelerator`, as they were given."""

    device_placement: bool
    split_batches: bool
    mixed_precision: str | None
    gradient_accumulation_steps: int
    cpu: bool
    dataloader_config: DataLoaderConfiguration | None
    project_dir: str | os.PathLike[str] | None
    project_config: ProjectConfiguration | None
    gradient_accumulation_plugin: GradientAccumulationPlugin | None
    step_scheduler_with_optimizer: bool
    kwargs_handlers: list[Any] | None
    checkpoint_policy: CheckpointPolicy | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an Accelerator is made of."""

    wishes: Wishes
    process: PartialState
    precision: Precision
    placement: Placement
    accumulation: GradientAccumulationPlugin
    project: ProjectConfiguration
    policy: CheckpointPolicy
    retention: Retention
    pin_explicit_saves: bool
    data_seed: int | None


def build_parts(wishes: Wishes) -> Parts:
    """Choose the parts that an Accelerator forwards to.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """
    policy = wishes.checkpoint_policy
    if policy is not None and not isinstance(policy, CheckpointPolicy):
        raise UsageError(
            f"checkpoint_policy is {policy!r:.100}; expected a CheckpointPolicy, as "
            "CheckpointPolicy(every_n_steps=100)"
        )
    environment = read_environment()
    loading = wishes.dataloader_config or DataLoaderConfiguration()
    project = _project(wishes.project_dir, wishes.project_config)
    accumulation = _accumulation(wishes, environment)
    name = environment.mixed_precision if wishes.mixed_precision is None else wishes.mixed_precision
    process = PartialState(cpu=wishes.cpu)
    return Parts(
        wishes=wishes,
        process=process,
        precision=_precision(
            str(name or "no"), process.device, _scaler_options(wishes.kwargs_handlers or [])
        ),
        placement=_placement(process.device, wishes.device_placement, loading),
        accumulation=accumulation,
        project=project,
        policy=policy or CheckpointPolicy(),
        retention=_retention(project, policy),
        # With no word on what to keep, what the user saves by hand stays, as in Accelerate; what is saved
        # automatically must not fill the disk.
        pin_explicit_saves=project.total_limit is None and policy is None,
        data_seed=loading.data_seed,
    )


def _precision(name: str, device: torch.device, scaler_options: dict[str, Any]) -> Precision:
    if name == "no":
        return FullPrecision()
    if name == "bf16":
        return BFloat16(device.type)
    if name == "fp16":
        return Float16(device.type, scaler_options)
    if name == "fp8":
        raise UsageError(
            "mixed_precision='fp8' needs a backend for 8-bit layers (torchao or TransformerEngine), and "
            f"keepstep has none yet. Use one of {', '.join(_PRECISIONS)}."
        )
    raise UsageError(f"mixed_precision={name!r}; it must be one of {', '.join(_PRECISIONS)}.")


def _scaler_options(handlers: list[Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for handler in handlers:
        if not isinstance(handler, GradScalerKwargs):
            raise UsageError(
                f"kwargs_handlers holds a {type(handler).__name__}; only GradScalerKwargs is allowed. "
                "Leave it out."
            )
        options = handler.to_kwargs()
    return options


def _placement(device: torch.device, wanted: bool, loading: DataLoaderConfiguration) -> Placement:
    if not wanted or device.type == "cpu":
        return LeaveInPlace()
    return MoveTo(device, non_blocking=loading.non_blocking)


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
