"""Collated batches, dealt out to ranks: what falls to each of one step's units; pure.

A step's units are given out whole, one to a rank. Only where there are too few of them, or the last one is
short, all their samples are put together and cut into equal parts. What is missing to equal parts is filled
from the beginning of the same step: that is the same in a run that began in the middle of the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from keepstep.world.nested import like

__all__ = ["NOTHING", "CannotCutError", "deal", "rows_of"]


class CannotCutError(ValueError):
    """A batch has no rows that could be told apart."""


class _Nothing:
    def __repr__(self) -> str:
        return "NOTHING"


NOTHING = _Nothing()
"""The share of a rank for which nothing is left."""


def deal(units: Sequence[Any], ranks: int, *, split: bool, even: bool) -> tuple[list[Any], int]:
    """Deal out one step.

    Args:
        units: one to each rank, or fewer in the last step; with `split`, the one that is to be cut.
        ranks: how many.
        split: cut one unit for all.
        even: give every rank as much as the others.

    Returns:
        The batch of each rank, or NOTHING; and how many samples in them are no fillers: 0 if the step is a
        full one, -1 if that can't be told.

    Raises:
        CannotCutError: a unit was to be split and has no rows.
    """
    if split:
        return _cut_evenly(units[0], ranks)
    sizes = [_rows_or_none(unit) for unit in units]
    known = [size for size in sizes if size is not None]
    real = sum(known) if len(known) == len(units) else -1
    if len(units) == ranks and len(set(sizes)) == 1:
        return list(units), 0
    if not even:
        return [*units, *[NOTHING] * (ranks - len(units))], real
    try:
        return _cut_evenly(_joined(units), ranks)
    except CannotCutError:
        # Of another shape each, say; whole units are repeated then.
        return [units[rank % len(units)] for rank in range(ranks)], real


def rows_of(batch: Any) -> int:
    """How many samples a batch holds: the length of its tensors along dimension 0.

    Raises:
        CannotCutError: it has no tensors, or of several lengths.
    """
    lengths: set[int] = set()
    _measure(batch, lengths)
    if len(lengths) != 1:
        found = f"of lengths {sorted(lengths)}" if lengths else "none at all"
        raise CannotCutError(f"its tensors should have one length along dimension 0, and there are {found}")
    return lengths.pop()


def _rows_or_none(batch: Any) -> int | None:
    try:
        return rows_of(batch)
    except CannotCutError:
        return None


def _cut_evenly(batch: Any, ranks: int) -> tuple[list[Any], int]:
    rows = rows_of(batch)
    part = -(-rows // ranks)
    shares = [_taken(batch, rows, range(rank * part, (rank + 1) * part)) for rank in range(ranks)]
    return shares, rows if rows % ranks else 0


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _holds_arrays(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_arrays(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_holds_arrays(item) for item in value)
    return _is_array(value)


def _measure(value: Any, lengths: set[int]) -> None:
    if _is_array(value):
        if value.ndim:
            lengths.add(len(value))
    elif isinstance(value, Mapping):
        for item in value.values():
            _measure(item, lengths)
    elif isinstance(value, list | tuple):
        for item in value:
            _measure(item, lengths)


def _taken(batch: Any, rows: int, picks: range) -> Any:
    """The samples `picks` of a batch, counted on from its beginning where they go beyond its end."""
    if picks.stop <= rows:
        return _changed(batch, rows, lambda value: value[picks.start : picks.stop])
    numbers = [pick % rows for pick in picks]
    return _changed(
        batch,
        rows,
        lambda value: value[numbers] if _is_array(value) else [value[number] for number in numbers],
    )


def _changed(value: Any, rows: int, change: Callable[[Any], Any]) -> Any:
    if _is_array(value):
        return change(value) if value.ndim else value
    if isinstance(value, Mapping):
        return like(value, [_changed(item, rows, change) for item in value.values()])
    if isinstance(value, list | tuple):
        if type(value) is list and len(value) == rows and not _holds_arrays(value):
            return change(value)  # one text or number to a sample
        return like(value, [_changed(item, rows, change) for item in value])
    return value


def _joined(batches: Sequence[Any]) -> Any:
    """Batches put together, sample after sample.

    Raises:
        CannotCutError: they are not alike.
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    sizes = [rows_of(batch) for batch in batches]
    return _together(list(batches), sizes)


def _together(values: list[Any], sizes: list[int]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise CannotCutError("batches of one step have different types")
    if _is_array(first):
        return _concatenated(values) if first.ndim else first
    if isinstance(first, Mapping):
        if any(set(value) != set(first) for value in values):
            raise CannotCutError("batches of one step have different keys")
        return like(first, [_together([value[key] for value in values], sizes) for key in first])
    if isinstance(first, list | tuple):
        alike = all(len(value) == size for value, size in zip(values, sizes, strict=True))
        if type(first) is list and alike and not _holds_arrays(first):
            return [item for value in values for item in value]
        if any(len(value) != len(first) for value in values):
            raise CannotCutError("batches of one step have different lengths")
        return like(first, [_together(list(items), sizes) for items in zip(*values, strict=True)])
    return first


def _concatenated(values: list[Any]) -> Any:
    if any(value.shape[1:] != values[0].shape[1:] or value.dtype != values[0].dtype for value in values):
        raise CannotCutError("tensors of one step have different shapes")
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return np.concatenate(values)
