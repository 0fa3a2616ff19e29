"""A model's whole state dict, wherever its parts are: offloaded, or in shards of several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from keepstep.errors import TensorNotSavableError
from keepstep.models.align import offloaded_state
from keepstep.models.naming import is_meta
from keepstep.tree import shard_of

__all__ = ["full_state", "is_sharded"]


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds only parts of some parameters."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def full_state(model: nn.Module, *, keep: bool = True) -> dict[str, Any]:
    """The state dict of a model with all values.

    Shards of a DTensor are gathered one tensor at a time: every rank has to call this, in the same order.

    Args:
        model: whose state it is.
        keep: False on ranks that only help to gather; they get an empty dict.

    Returns:
        Values by name. What was gathered is on the CPU; all else is the model's own memory.

    Raises:
        TensorNotSavableError: a tensor is on the meta device, and is offloaded nowhere.
    """
    offloaded = offloaded_state(model)
    gathered: dict[tuple[Any, ...], torch.Tensor] = {}
    state: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if name in offloaded:
            value = offloaded[name]
        elif isinstance(value, torch.Tensor) and is_meta(value):
            raise TensorNotSavableError(
                f"{name!r} is on the meta device and has no values. Load a checkpoint into the model first"
            )
        elif isinstance(value, torch.Tensor) and hasattr(value, "full_tensor"):
            part = shard_of(value)
            place = (part[0].data_ptr() if part else id(value), value.shape, value.dtype)
            if place not in gathered or not place[0]:  # tied weights are gathered once
                whole: torch.Tensor = value.full_tensor()
                gathered[place] = whole.cpu() if keep else whole.new_empty(0)
            value = gathered[place]
        if keep:
            state[name] = value
    return state
