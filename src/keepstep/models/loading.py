"""Weights from a checkpoint into a model, each to its device; nothing changes unless all of it fits."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from keepstep.errors import MismatchError, UsageError
from keepstep.models.device_map import check_device_map
from keepstep.models.naming import (
    Device,
    dtype_of,
    find_tied_parameters,
    is_meta,
    placed_on,
    retie_parameters,
    set_module_tensor_to_device,
)
from keepstep.models.offload import OffloadFolder
from keepstep.models.weights import read_weights
from keepstep.tree import shard_of

__all__ = ["differences_of", "fill", "load_checkpoint_in_model"]

_log = logging.getLogger(__name__)


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Device] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,  # noqa: ARG001  (weights are mapped, so there is nothing to save)
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    strict: bool = False,
    full_state_dict: bool = True,
) -> None:
    """Load weights into a model, one tensor at a time: its values, and at most one tensor beside them.

    Args:
        model: changed in place; it may be on the meta device, or hold DTensors, of which each rank fills
            its own part.
        checkpoint: a safetensors or torch file, an index, a directory of them, or a keepstep checkpoint.
        device_map: devices by name of module; None leaves tensors where they are (on the CPU, if they are
            on the meta device so far).
        offload_folder: where tensors go whose device is "disk".
        dtype: what floating point values become; None keeps the model's own.
        offload_state_dict: without effect, as weights are read from the files as they are needed.
        offload_buffers: buffers of modules on the disk go there too.
        keep_in_fp32_modules: names of modules whose values stay float32, whatever `dtype` says.
        strict: refuse a checkpoint that lacks tensors or has more; else that is a warning.
        full_state_dict: only True: a checkpoint of whole tensors.

    Raises:
        MismatchError: shapes differ, or (with `strict`) names do; nothing was changed.
        UsageError: the device map leaves a tensor out, or names the disk without `offload_folder`.
        CheckpointNotFoundError, DamagedCheckpointError, ForeignTypeError: see `read_weights`.
    """
    if not full_state_dict:
        raise UsageError(
            "full_state_dict=False means weights that are cut into shards of ranks; load such a checkpoint "
            "with load_state(), or through keepstep.dcp"
        )
    kept = tuple(keep_in_fp32_modules or ())
    ties = find_tied_parameters(model)
    weights = _with_tied_names(read_weights(checkpoint), ties)
    if device_map is not None:
        check_device_map(model, device_map)
        if offload_folder is None and "disk" in device_map.values():
            raise UsageError('the device_map puts modules on the "disk"; pass offload_folder, where they go')
    _check(model, weights, checkpoint, strict=strict)
    loading = _Loading(model, dtype=dtype_of(dtype), kept=kept)
    if device_map is None:
        loading.in_place(weights)
    else:
        loading.to_devices(weights, device_map, offload_folder, offload_buffers=offload_buffers)
    retie_parameters(model, ties)


def differences_of(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """What of some weights doesn't fit a model, one sentence each; empty if they are just its own.

    Args:
        model: it may have tied weights, which need be there under one name only.
        weights: by name.
    """
    completed = _with_tied_names(dict(weights), find_tied_parameters(model))
    different, missing, unexpected = _compared(model, completed)
    return [
        *different,
        *(f"{name} is missing from the checkpoint" for name in missing),
        *(f"{name} is in the checkpoint, and not in the model" for name in unexpected),
    ]


def fill(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights that fit into a model's own memory; of a DTensor this rank's part."""
    completed = _with_tied_names(dict(weights), find_tied_parameters(model))
    _Loading(model, dtype=None, kept=()).in_place(completed)


def _compared(
    model: nn.Module, weights: Mapping[str, torch.Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Shapes that differ, and names that are missing and unexpected among the weights."""
    targets = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    different = [
        f"{name}: the shape is {list(weights[name].shape)} in the checkpoint and {list(value.shape)} here"
        for name, value in targets.items()
        if name in weights and weights[name].shape != value.shape
    ]
    missing = [name for name in targets if name not in weights]
    return different, missing, [name for name in weights if name not in targets]


def _check(
    model: nn.Module, weights: Mapping[str, torch.Tensor], checkpoint: object, *, strict: bool
) -> None:
    """Compare names and shapes before anything is changed."""
    different, missing, unexpected = _compared(model, weights)
    if different or (strict and (missing or unexpected)):
        raise MismatchError(
            f"{checkpoint} does not fit this {type(model).__name__}; nothing was changed.",
            missing=missing,
            unexpected=unexpected,
            different=different,
        )
    if missing:
        _log.warning(
            "%s lacks %s; these keep the values that they have, which are random in a new model",
            checkpoint,
            _some(missing),
        )
    if unexpected:
        _log.warning("%s holds %s, which the model does not have", checkpoint, _some(unexpected))


def _with_tied_names(
    weights: dict[str, torch.Tensor], ties: Sequence[Sequence[str]]
) -> dict[str, torch.Tensor]:
    """A tied weight is stored once, under any of its names; here it is found under each."""
    for group in ties:
        stored = [name for name in group if name in weights]
        weights.update({name: weights[stored[0]] for name in group if stored and name not in weights})
    return weights


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class _Loading:
    def __init__(self, model: nn.Module, *, dtype: torch.dtype | None, kept: Sequence[str]) -> None:
        self._model = model
        self._dtype = dtype
        self._kept = kept

    def _dtype_for(self, name: str, value: torch.Tensor) -> torch.dtype | None:
        """What a tensor is converted to; None for the dtype that it has in the model."""
        if self._dtype is None or not value.is_floating_point():
            return None
        keeps = any(f"{part}." in name or part == name for part in self._kept)
        return torch.float32 if keeps else self._dtype

    @torch.no_grad()
    def in_place(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Fill the tensors that are there; those on the meta device are made on the CPU."""
        plain = {}
        targets = self._model.state_dict(keep_vars=True)
        for name, target in targets.items():
            value = weights.get(name)
            if value is None or not isinstance(target, torch.Tensor):
                continue
            wanted, part = self._dtype_for(name, value), shard_of(target)
            if part is not None:
                local, at = part
                cut = tuple(slice(begin, begin + n) for begin, n in zip(at, local.shape, strict=True))
                local.copy_(value[cut])
            elif is_meta(target) or wanted not in (None, target.dtype):
                device = torch.device("cpu") if is_meta(target) else target.device
                set_module_tensor_to_device(self._model, name, device, value.clone(), wanted or target.dtype)
            else:
                plain[name] = value
        if plain:  # by the model's own way, which modules may have made theirs
            self._model.load_state_dict(plain, strict=False)

    def to_devices(
        self,
        weights: Mapping[str, torch.Tensor],
        device_map: Mapping[str, Device],
        offload_folder: str | os.PathLike[str] | None,
        *,
        offload_buffers: bool,
    ) -> None:
        """Put each tensor where the map says."""
        targets = self._model.state_dict()
        buffers = {name for name, _ in self._model.named_buffers()}
        offloaded: dict[str, torch.Tensor] = {}
        for name, value in weights.items():
            if name not in targets:
                continue
            device = placed_on(device_map, name)
            dtype = self._dtype_for(name, value) or targets[name].dtype
            if device == "disk" and (offload_buffers or name not in buffers):
                offloaded[name] = value.to(dtype) if value.is_floating_point() else value
            else:
                there = "cpu" if device == "disk" or device is None else device
                copied = value.clone() if torch.device(there).type == "cpu" else value
                set_module_tensor_to_device(self._model, name, there, copied, dtype)
        if offloaded and offload_folder is not None:
            OffloadFolder(offload_folder).add(offloaded)
            for name, value in offloaded.items():
                set_module_tensor_to_device(self._model, name, "meta", value.to("meta"), value.dtype)
