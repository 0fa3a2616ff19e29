"""What the script said of a step, should that step be saved later than it was said, or again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["About", "Told"]


@dataclass(frozen=True, kw_only=True)
class About:
    """What the user said of a checkpoint, should it have to be made again.

    Attributes:
        metrics: to find the best checkpoint by.
        tags: names; a single one may stand alone.
    """

    metrics: Mapping[str, Any] | None = None
    tags: Sequence[str] = ()

    def in_place_of(self, lost: About) -> About:
        """Of a checkpoint that stands for a lost one as well: a tag says that a checkpoint is to stay."""
        return replace(self, tags=tuple(dict.fromkeys((*_each(lost.tags), *_each(self.tags)))))


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


def _each(tags: Sequence[str]) -> Sequence[str]:
    return (tags,) if isinstance(tags, str) else tags


def _now(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
