"""What the script said of its newest step, should that step be saved later than it was said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["Told"]


class Told:
    """The metrics of the last call of `checkpoint()`."""

    def __init__(self) -> None:
        self._step = -1
        self._metrics: dict[str, Any] | None = None

    def tell(self, step: int, metrics: Mapping[str, Any] | None) -> None:
        """Keep them as they are now: a tensor may be a running sum that the script goes on to change."""
        self._step = step
        self._metrics = None if metrics is None else {name: _now(value) for name, value in metrics.items()}

    def at(self, step: int) -> Mapping[str, Any] | None:
        """Those that were told at a step; None if it is another one than the last."""
        return self._metrics if step == self._step else None


def _now(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
