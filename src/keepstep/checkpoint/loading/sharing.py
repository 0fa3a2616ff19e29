"""Live tensors that share memory: do the values saved for them agree, and which need not be read twice?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepstep.checkpoint.format.boxes import Box
from keepstep.checkpoint.format.manifest import TensorEntry, stored_parts
from keepstep.checkpoint.loading.passes import bytes_of
from keepstep.checkpoint.loading.reader import Reader
from keepstep.tree import address_of

__all__ = ["Place", "elements_of_box", "shared_memory_problems", "without_views"]


@dataclass(frozen=True, slots=True)
class Place:
    """A live tensor that takes the value saved at `address`."""

    path: tuple[Any, ...]
    address: str
    tensor: torch.Tensor
    box: Box | None = None
    """Which elements of the saved value; None for all."""

    @property
    def end(self) -> int:
        """Address after its last element."""
        tensor = self.tensor
        if tensor.is_contiguous():
            return tensor.data_ptr() + tensor.nbytes
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr() + (last + 1) * tensor.itemsize


def shared_memory_problems(reader: Reader, places: Iterable[Place]) -> Iterator[str]:
    """Live tensors that share memory can't take two different saved values: each pair, in words."""
    for cluster in _clusters([place for place in places if place.tensor.numel()]):
        if all(_agree(reader, cluster[0], place) for place in cluster[1:]):
            continue
        pairs = (
            _adjacent_pairs(cluster)
            if all(place.tensor.is_contiguous() for place in cluster)
            else _pairs_by_element(cluster)
        )
        for first, second in pairs:
            if not _agree(reader, first, second):
                yield (
                    f"{address_of(second.path)} and {address_of(first.path)} share memory in the live "
                    "objects, but were saved with values of their own"
                )


def _clusters(places: list[Place]) -> Iterator[list[Place]]:
    """Places whose spans of addresses touch each other, the longest first; single ones are left out."""
    spans = [(str(place.tensor.device), place.tensor.data_ptr(), -place.end, place) for place in places]
    spans.sort(key=lambda span: span[:3])
    cluster: list[Place] = []
    device, reach = "", 0
    for where, begin, negative_end, place in spans:
        if cluster and (where != device or begin >= reach):
            if len(cluster) > 1:
                yield cluster
            cluster, reach = [], 0
        cluster.append(place)
        device, reach = where, max(reach, -negative_end)
    if len(cluster) > 1:
        yield cluster


def _adjacent_pairs(cluster: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    """Overlapping pairs of dense places: each with the one that reaches furthest into it."""
    before = cluster[0]
    for place in cluster[1:]:
        if place.tensor.data_ptr() < before.end:
            yield before, place
        if place.end > before.end:
            before = place


def _pairs_by_element(cluster: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    """Overlapping pairs where spans interleave: marks each element's owner (rare, so it may cost)."""
    begin = min(place.tensor.data_ptr() for place in cluster)
    unit = math.gcd(
        *(place.tensor.itemsize for place in cluster), *(place.tensor.data_ptr() - begin for place in cluster)
    )
    owner = torch.zeros((max(place.end for place in cluster) - begin) // unit, dtype=torch.int32)
    for number, place in enumerate(cluster, start=1):
        tensor, count = place.tensor, place.tensor.itemsize // unit
        marks = owner.as_strided(
            (*tensor.shape, count),
            (*(step * count for step in tensor.stride()), 1),
            (tensor.data_ptr() - begin) // unit,
        )
        for other in torch.unique(marks).tolist():
            if other:
                yield cluster[other - 1], place
        marks.fill_(number)


def _agree(reader: Reader, first: Place, second: Place) -> bool:
    """Whether two places over one memory are saved as views of one tensor, or with the same bytes."""
    a, b = reader.entry(first.address), reader.entry(second.address)
    same_live = _view(first.tensor) == _view(second.tensor)
    if reader.stored(first.address) != reader.stored(second.address):
        if same_live and stored_parts(a) and _content(a) == _content(b):
            return True
        if same_live and a.digest is not None and b.digest is not None:
            return False
        return _same_where_they_overlap(reader, first, second)
    a_offset, a_stride = _saved_view(reader, first.address)
    b_offset, b_stride = _saved_view(reader, second.address)
    if same_live and (a_offset, _steps(a.shape, a_stride)) == (b_offset, _steps(b.shape, b_stride)):
        return True
    as_saved = all(
        _steps(place.tensor.shape, place.tensor.stride()) == _steps(place.tensor.shape, stride)
        for place, stride in ((first, a_stride), (second, b_stride))
    )
    return as_saved and b_offset - a_offset == second.tensor.data_ptr() - first.tensor.data_ptr()


def _content(entry: TensorEntry) -> tuple[Any, ...]:
    """What is stored, wherever it lies."""
    return entry.dtype, entry.shape, entry.digest, [(c.at, c.shape, c.digest) for c in entry.chunks]


def _same_where_they_overlap(reader: Reader, first: Place, second: Place) -> bool:
    """Reads both to compare: dense views that overlap in part were saved apart (rare, so it may cost)."""
    if not all(
        p.tensor.is_contiguous() and not p.tensor.is_conj() and not p.tensor.is_neg() for p in (first, second)
    ):
        return False
    begin = max(first.tensor.data_ptr(), second.tensor.data_ptr())
    end = min(first.end, second.end)
    saved = reader.fresh([first.address, second.address])
    mine, theirs = (
        bytes_of(elements_of_box(saved[p.address], p.box).contiguous())[
            begin - p.tensor.data_ptr() : end - p.tensor.data_ptr()
        ]
        for p in (first, second)
    )
    return np.array_equal(mine, theirs)


def elements_of_box(saved: torch.Tensor, box: Box | None) -> torch.Tensor:
    """What of a saved tensor a place takes."""
    for dimension, (begin, size) in enumerate(zip(box.at, box.shape, strict=True) if box else ()):
        saved = saved.narrow(dimension, begin, size)
    return saved


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    steps = _steps(tensor.shape, tensor.stride())
    return tensor.data_ptr(), tuple(tensor.shape), steps, tensor.dtype, tensor.is_conj(), tensor.is_neg()


def _saved_view(reader: Reader, address: str) -> tuple[int, tuple[int, ...]]:
    """Offset in bytes and strides in elements, within the stored tensor."""
    entry = reader.entry(address)
    if entry.stride is not None:
        return entry.offset, entry.stride
    return 0, tuple(math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape)))


def _steps(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides that count: a dimension of one element has none."""
    return tuple(step for size, step in zip(shape, stride, strict=True) if size > 1)


def without_views(reader: Reader, places: Iterable[Place]) -> Iterator[Place]:
    """Leave out places that are filled when the tensor they are a view of is filled."""
    filled: set[tuple[str, torch.device, int]] = set()
    for place in sorted(places, key=lambda place: reader.entry(place.address).alias_of is not None):
        entry, begin = reader.entry(place.address), place.tensor.data_ptr()
        if entry.alias_of is None or entry.stride is None:
            if place.tensor.is_contiguous():
                filled.add((place.address, place.tensor.device, begin))
            yield place
            continue
        as_saved = _steps(entry.shape, place.tensor.stride()) == _steps(entry.shape, entry.stride)
        if not (as_saved and (entry.alias_of, place.tensor.device, begin - entry.offset) in filled):
            yield place
