"""Generators that an object keeps for itself, such as `self.rng = numpy.random.default_rng(0)`.

A generator that is kept goes on from where it was last left, so what it gives depends on history: on
earlier passes, and on how many workers share the work. While a piece of such an object runs, each kept
generator is replaced by one seeded for exactly that piece, and the object's own is put back untouched.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

__all__ = ["KeptGenerator", "Replacement", "find_generators", "fresh_generator"]

_MAX_DEPTH = 5
_MAX_ITEMS = 64
_PLAIN = (str, bytes, int, float, complex, torch.Tensor, torch.nn.Module, type)

KeptGenerator = tuple[dict[str, Any], str]
"""The attribute dictionary of the object that keeps a generator, and the attribute's name."""


def find_generators(root: object) -> list[KeptGenerator]:
    """Find the generators that `root` and the datasets, samplers and callables within it keep.

    Looked at are attributes, and lists and tuples of up to 64 items, five levels deep: enough for
    transforms in a pipeline in a dataset in a subset.
    """
    found: list[KeptGenerator] = []
    seen: set[int] = set()
    waiting: list[tuple[object, int]] = [(root, 0)]
    while waiting:
        holder, depth = waiting.pop(0)
        if id(holder) in seen or depth > _MAX_DEPTH:
            continue
        seen.add(id(holder))
        if isinstance(holder, list | tuple):
            waiting += [(item, depth + 1) for item in holder[:_MAX_ITEMS] if _may_hold(item)]
            continue
        attributes = getattr(holder, "__dict__", None)
        if not isinstance(attributes, dict):
            continue
        for name, value in attributes.items():
            if _is_generator(value):
                found.append((attributes, name))
            elif _may_hold(value):
                waiting.append((value, depth + 1))
    return found


def _may_hold(value: object) -> bool:
    if isinstance(value, _PLAIN):
        return False
    return isinstance(value, list | tuple | Dataset | Sampler) or callable(value)


def _is_generator(value: object) -> bool:
    # Subclasses of Random draw in ways of their own (SystemRandom from the system): not ours to replace.
    if isinstance(value, torch.Generator) or type(value) is random.Random:
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.random.Generator | numpy.random.RandomState)


def fresh_generator(like: Any, seed: int) -> Any:
    """A generator of the same kind as `like` (a torch CPU one for None), seeded."""
    if like is None or isinstance(like, torch.Generator):
        return torch.Generator(device="cpu" if like is None else like.device).manual_seed(seed)
    if type(like) is random.Random:
        return random.Random(seed)  # noqa: S311
    numpy = sys.modules["numpy"]
    if isinstance(like, numpy.random.RandomState):
        return numpy.random.RandomState(seed & 0xFFFFFFFF)
    return numpy.random.Generator(type(like.bit_generator)(seed))


class Replacement:
    """Seeded generators that take the places of kept ones while it is entered.

    Entered again, it goes on with the same generators from where they were left.

    Args:
        kept: from `find_generators`.
        seed: of the first generator; each further one gets the next seed.
    """

    def __init__(self, kept: Sequence[KeptGenerator], seed: int) -> None:
        self._kept = kept
        fresh: dict[int, Any] = {}
        self._outside: list[Any] = []
        for number, (attributes, name) in enumerate(kept):
            mine = attributes[name]
            # A generator that two objects share stays shared.
            if id(mine) not in fresh:
                fresh[id(mine)] = fresh_generator(mine, seed + number)
            self._outside.append(fresh[id(mine)])

    def _swap(self) -> None:
        inside = [attributes[name] for attributes, name in self._kept]
        for (attributes, name), generator in zip(self._kept, self._outside, strict=True):
            attributes[name] = generator
        self._outside = inside

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *failure: object) -> None:
        self._swap()
