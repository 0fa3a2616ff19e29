"""Batches onto the device that trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

__all__ = ["LeaveInPlace", "MoveTo", "Placement", "send_to_device"]


class Placement(Protocol):
    """What happens to a batch before the training loop gets it."""

    def __call__(self, batch: Any) -> Any:
        """Return the batch, placed."""
        ...


class LeaveInPlace:
    """Batches stay where the loader made them."""

    def __call__(self, batch: Any) -> Any:
        """Return `batch` as it is."""
        return batch


class MoveTo:
    """Batches move to a device.

    Args:
        device: where to.
        non_blocking: let the copy overlap with computation; the loader should pin its memory then.
    """

    def __init__(self, device: torch.device, *, non_blocking: bool = False) -> None:
        self._device = device
        self._non_blocking = non_blocking

    def __call__(self, batch: Any) -> Any:
        """Return `batch` on the device."""
        return send_to_device(batch, self._device, non_blocking=self._non_blocking)


def send_to_device(value: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Move every tensor in a nesting of dicts, lists, tuples, named tuples and objects with `.to`.

    Containers keep their types; everything else is returned as it is.
    """
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(send_to_device(item, device, non_blocking=non_blocking) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(send_to_device(item, device, non_blocking=non_blocking) for item in value)
    # Batch classes are often mappings that know how to move themselves.
    if hasattr(value, "to"):
        return _move_object(value, device, non_blocking)
    if isinstance(value, Mapping):
        items = {key: send_to_device(item, device, non_blocking=non_blocking) for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    return value


def _move_object(value: Any, device: torch.device, non_blocking: bool) -> Any:
    try:
        return value.to(device, non_blocking=non_blocking)
    except TypeError:
        # Not every `.to` knows the option.
        return value.to(device)
