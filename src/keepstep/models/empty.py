"""Models without values, or made on a given device from the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from keepstep.models.naming import Device

__all__ = ["init_empty_weights", "init_on_device"]


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Make models whose parameters are on the meta device: they take no memory, and have no values.

    Load values with `load_checkpoint_and_dispatch` or `load_checkpoint_in_model`.

    Args:
        include_buffers: buffers too; False and None leave them on the CPU, with the values that they get.
    """
    with init_on_device(torch.device("meta"), include_buffers=include_buffers):
        yield


@contextmanager
def init_on_device(device: Device, include_buffers: bool | None = None) -> Iterator[None]:
    """Make models whose parameters are on a device as soon as they are registered.

    Args:
        device: where they go.
        include_buffers: buffers too, and every other tensor that is made inside.
    """
    target = torch.device(device)
    if include_buffers:
        with target:
            yield
        return
    register: Any = nn.Module.register_parameter

    def register_there(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        held: Any = module._parameters[name]
        # One that is there already may be tied to another module's, and stays that one.
        if held is None or held.device == target:
            return
        moved = type(held)(held.to(target), requires_grad=held.requires_grad)
        moved.__dict__.update(held.__dict__)
        module._parameters[name] = moved

    nn.Module.register_parameter = register_there  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
