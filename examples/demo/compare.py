"""Whether two runs are the same: their losses, their weights, and every part of their last checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from examples.demo.training import DemoError, Loss

from keepstep import Checkpoint, save_directory

__all__ = ["change_one_weight", "differences", "same_losses"]


def same_losses(killed: Sequence[Loss], twin: Sequence[Loss]) -> int:
    """Check that each loss of every attempt is exactly the twin's at that step.

    Returns:
        How many were compared.

    Raises:
        DemoError: one isn't, or a step lacks one.
    """
    expected = {loss.step: loss.loss for loss in twin}
    missing = expected.keys() ^ {loss.step for loss in killed}
    if missing:
        raise DemoError(f"Only one of the two runs logged a loss for the steps {sorted(missing)[:10]}.")
    for loss in killed:
        if loss.loss != expected[loss.step]:
            raise DemoError(
                f"At step {loss.step} process {loss.pid} had a loss of {loss.loss!r}; the twin's is "
                f"{expected[loss.step]!r}."
            )
    return len(killed)


def differences(killed: Checkpoint, twin: Checkpoint) -> list[str]:
    """Compare two checkpoints part by part.

    Returns:
        A sentence for each part that differs; none if the checkpoints hold the same.
    """
    return list(_differences("", killed.load(), twin.load()))


def _differences(at: str, mine: Any, its: Any) -> Iterator[str]:
    if type(mine) is not type(its):
        yield f"{at} is a {type(mine).__name__}, the twin's a {type(its).__name__}"
    elif isinstance(mine, Mapping):
        for key in [*mine, *(key for key in its if key not in mine)]:
            inner = f"{at}/{key}" if at else str(key)
            if key in mine and key in its:
                yield from _differences(inner, mine[key], its[key])
            else:
                yield f"{inner} is only in {'this' if key in mine else 'the twin'}"
    elif isinstance(mine, list | tuple):
        if len(mine) != len(its):
            yield f"{at} has {len(mine)} items, the twin's {len(its)}"
        for index, (left, right) in enumerate(zip(mine, its, strict=False)):
            yield from _differences(f"{at}/{index}", left, right)
    elif isinstance(mine, torch.Tensor):
        yield from _tensor_differences(at, mine, its)
    elif not _same_value(mine, its):
        yield f"{at} is {mine!r:.60}, the twin's {its!r:.60}"


def _tensor_differences(at: str, mine: torch.Tensor, its: torch.Tensor) -> Iterator[str]:
    if (mine.shape, mine.dtype) != (its.shape, its.dtype):
        yield f"{at} is {list(mine.shape)} {mine.dtype}, the twin's {list(its.shape)} {its.dtype}"
        return
    changed = int((_bytes_of(mine) != _bytes_of(its)).any(dim=1).sum())
    if changed:
        off = float((mine.double() - its.double()).abs().max())
        yield f"{at} differs in {changed} of {mine.numel()} values, by up to {off:.3g}"


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A row of bytes for each value: -0.0 is not 0.0, and a NaN is itself."""
    return tensor.reshape(-1).view(torch.uint8).reshape(-1, tensor.element_size())


def _same_value(mine: Any, its: Any) -> bool:
    if isinstance(mine, float):
        return mine == its or (math.isnan(mine) and math.isnan(its))
    if hasattr(mine, "tobytes"):  # NumPy's arrays and scalars
        return bool(mine.dtype == its.dtype and mine.tobytes() == its.tobytes())
    return bool(mine == its)


def change_one_weight(checkpoint: Checkpoint) -> Checkpoint:
    """Put a sound checkpoint, in which one weight is off by the least that a number can be, in its place."""
    state = checkpoint.load()
    name, weights = next(iter(state["model"].items()))
    changed = weights.clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(torch.inf))
    state["model"][name] = changed
    metrics = checkpoint.metrics
    return save_directory(
        checkpoint.path, state, step=checkpoint.step, epoch=checkpoint.epoch, metrics=metrics
    )
