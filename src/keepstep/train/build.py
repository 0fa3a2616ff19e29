"""Strings, options and the environment -> parts. Nothing below this module parses any of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
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
from keepstep.train.placement import LeaveInPlace, MoveTo, Placement
from keepstep.train.precision import BFloat16, Float16, FullPrecision, Precision
from keepstep.world import OneRank, World

__all__ = ["Parts", "build_parts"]

_PRECISIONS = ("no", "bf16", "fp16")
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What an Accelerator is made of."""

    world: World
    device: torch.device
    precision: Precision
    placement: Placement
    accumulation: GradientAccumulationPlugin
    project: ProjectConfiguration
    policy: CheckpointPolicy
    retention: Retention
    pin_explicit_saves: bool
    data_seed: int | None


def build_parts(
    *,
    device_placement: bool,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    cpu: bool,
    project_dir: str | os.PathLike[str] | None,
    project_config: ProjectConfiguration | None,
    gradient_accumulation_plugin: GradientAccumulationPlugin | None,
    dataloader_config: DataLoaderConfiguration | None,
    checkpoint_policy: CheckpointPolicy | None,
    kwargs_handlers: list[Any] | None,
) -> Parts:
    """Choose the parts that an Accelerator forwards to; arguments as there.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """
    if checkpoint_policy is not None and not isinstance(checkpoint_policy, CheckpointPolicy):
        raise UsageError(
            f"checkpoint_policy is {checkpoint_policy!r:.100}; expected a CheckpointPolicy, as "
            "CheckpointPolicy(every_n_steps=100)"
        )
    world = _world(os.environ)
    device = _device(cpu or _flag(os.environ, "KEEPSTEP_USE_CPU"), world)
    name = (
        mixed_precision if mixed_precision is not None else os.environ.get("KEEPSTEP_MIXED_PRECISION", "no")
    )
    loading = dataloader_config or DataLoaderConfiguration()
    project = _project(project_dir, project_config)
    return Parts(
        world=world,
        device=device,
        precision=_precision(str(name), device, _scaler_options(kwargs_handlers or [])),
        placement=_placement(device, device_placement, loading),
        accumulation=_accumulation(gradient_accumulation_steps, gradient_accumulation_plugin),
        project=project,
        policy=checkpoint_policy or CheckpointPolicy(),
        retention=_retention(project, checkpoint_policy),
        # With no word on what to keep, what the user saves by hand stays, as in Accelerate; what is saved
        # automatically must not fill the disk.
        pin_explicit_saves=project.total_limit is None and checkpoint_policy is None,
        data_seed=loading.data_seed,
    )


def _flag(environment: Mapping[str, str], name: str) -> bool:
    value = environment.get(name, "").lower()
    if value not in _TRUE + _FALSE:
        raise UsageError(
            f"{name}={value!r} in the environment; it must be one of {', '.join(_TRUE + _FALSE[1:])}."
        )
    return value in _TRUE


def _world(environment: Mapping[str, str]) -> World:
    size = environment.get("WORLD_SIZE", "1")
    if size not in ("", "1"):
        raise UsageError(
            f"WORLD_SIZE={size} in the environment: a launcher started several processes, but this version "
            "of keepstep trains with one. Start the script with plain `python`."
        )
    return OneRank()


def _device(cpu: bool, world: World) -> torch.device:
    found = None if cpu else torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, world.local_rank)


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


def _accumulation(steps: int, plugin: GradientAccumulationPlugin | None) -> GradientAccumulationPlugin:
    if plugin is None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UsageError(f"gradient_accumulation_steps={steps!r}; it must be an integer of at least 1.")
        from_environment = os.environ.get("KEEPSTEP_GRADIENT_ACCUMULATION_STEPS", "")
        if steps == 1 and from_environment:
            return GradientAccumulationPlugin(num_steps=_integer(from_environment))
        return GradientAccumulationPlugin(num_steps=steps)
    if steps != 1:
        raise UsageError(
            f"gradient_accumulation_steps={steps} and gradient_accumulation_plugin "
            f"(num_steps={plugin.num_steps}) were both given. Leave out gradient_accumulation_steps."
        )
    return plugin


def _integer(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(
            f"KEEPSTEP_GRADIENT_ACCUMULATION_STEPS={text!r} in the environment; it must be an integer of at "
            "least 1."
        )
    return int(text)


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
