"""Batches onto the device that trains."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from keepstep.models.moving import send_to_device

__all__ = ["LeaveInPlace", "MoveTo", "Placement"]


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
