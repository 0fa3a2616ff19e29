"""Boxes of a tensor's elements: do they tile it, and where do two of them meet? Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "meeting", "problem_of_tiling", "run_in"]

MAX_CUTS = 64
"""How often a tensor may be cut anew within a part of it; a mesh of six dimensions needs far fewer."""


@dataclass(frozen=True, slots=True)
class Box:
    """The elements from `at` on, `shape` of them in each dimension."""

    at: tuple[int, ...]
    shape: tuple[int, ...]


def problem_of_tiling(whole: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that have to cover a tensor, each element once; None if nothing is.

    They must be what repeated straight cuts through the tensor give, as all sharding over a mesh does.
    That keeps the check quick for any input.
    """
    for box in boxes:
        if len(box.at) != len(whole) or len(box.shape) != len(whole):
            return f"the chunk at {list(box.at)} has not the tensor's {len(whole)} dimensions"
        if not math.prod(box.shape):
            return f"the chunk at {list(box.at)} has no elements"
        if any(begin + size > most for begin, size, most in zip(box.at, box.shape, whole, strict=True)):
            return f"the chunk of shape {list(box.shape)} at {list(box.at)} reaches out of {list(whole)}"
    covered = sum(math.prod(box.shape) for box in boxes)
    if covered != math.prod(whole):
        return f"its chunks have {covered} elements, the tensor {math.prod(whole)}"
    return (
        None if _cut_apart(list(boxes), len(whole)) else "its chunks overlap, or no straight cuts give them"
    )


def _cut_apart(boxes: list[Box], dimensions: int) -> bool:
    """Whether straight cuts part all boxes: then none overlaps another."""
    parts = [boxes]
    for _ in range(MAX_CUTS):
        parts = [part for part in parts if len(part) > 1]
        if not parts:
            return True
        cut: list[list[Box]] = []
        for part in parts:
            pieces = next((p for d in range(dimensions) if len(p := _cut_along(part, d)) > 1), None)
            if pieces is None:
                return False
            cut += pieces
        parts = cut
    return False


def _cut_along(boxes: list[Box], dimension: int) -> list[list[Box]]:
    """Part boxes wherever a straight cut across this dimension goes through none of them."""
    parts: list[list[Box]] = []
    reach = -1
    for box in sorted(boxes, key=lambda box: box.at[dimension]):
        if box.at[dimension] >= reach:
            parts.append([])
        parts[-1].append(box)
        reach = max(reach, box.at[dimension] + box.shape[dimension])
    return parts


def meeting(first: Box, second: Box) -> Box | None:
    """The elements that two boxes have in common, or None."""
    at = tuple(map(max, first.at, second.at))
    ends = [
        min(a + m, b + n) for a, m, b, n in zip(first.at, first.shape, second.at, second.shape, strict=True)
    ]
    shape = tuple(end - begin for begin, end in zip(at, ends, strict=True))
    return Box(at, shape) if all(size > 0 for size in shape) else None


def run_in(outer: Box, inner: Box) -> int | None:
    """Where a box begins in the dense memory of one around it, in elements; None if in several runs."""
    begin = 0
    for a, b, most in zip(inner.at, outer.at, outer.shape, strict=True):
        begin = begin * most + a - b
    partial = [n for n, (size, most) in enumerate(zip(inner.shape, outer.shape, strict=True)) if size != most]
    if partial and math.prod(inner.shape[: partial[-1]]) != 1:
        return None
    return begin
