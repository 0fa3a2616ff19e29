"""Generators that an object keeps for itself, such as `self.rng = numpy.random.default_rng(0)`.

A generator that is kept goes on from where it was last left, so what it gives depends on history: on
earlier passes, and on how many workers share the work. While a piece of such an object runs, each kept
generator is replaced by one seeded for exactly that piece, and the object's own is put back untouched.

Some objects make theirs only when they first draw. Such a one could not be replaced in time, so it is looked
for once more after the first use, and what was drawn from it is drawn again.
"""

from __future__ import annotations

import logging
import random
import sys
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import islice
from types import MethodType, ModuleType
from typing import Any

import torch

__all__ = ["KeptGenerator", "KeptGenerators", "Replacement", "find_generators", "fresh_generator", "reseed"]

_MAX_DEPTH = 5
_MAX_ITEMS = 64
_MAX_OBJECTS = 10_000
_KEEPS_NOTHING = frozenset({str, bytes, int, float, complex, bool, type(None), torch.Tensor})
_CONTAINERS = frozenset({list, dict, tuple})
_PLAIN = (str, bytes, int, float, complex, torch.Tensor, torch.nn.Module, type, ModuleType, logging.Logger)

KeptGenerator = tuple[Any, Any]
"""What keeps a generator (attributes of an object, a dict or a list), and under which name or number."""


def find_generators(root: object) -> list[KeptGenerator]:
    """Find the generators that `root` and the objects within it keep.

    Looked at are attributes, what methods are bound to, and the first 64 items of dicts, lists and tuples,
    five levels deep and 10,000 objects in all: enough for transforms in a pipeline in a dataset in a subset.
    """
    found: list[KeptGenerator] = []
    seen: set[int] = set()
    waiting: deque[tuple[object, int]] = deque([(root, 0)])
    while waiting and len(seen) < _MAX_OBJECTS:
        holder, depth = waiting.popleft()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        owner, items = _contents(holder)
        for name, value in items:
            kind = type(value)
            if kind in _KEEPS_NOTHING:  # most values: the search is quick because of this
                continue
            if kind not in _CONTAINERS and _is_generator(value) and not isinstance(owner, tuple):
                found.append((owner, name))
            elif depth < _MAX_DEPTH and len(waiting) < _MAX_OBJECTS and not isinstance(value, _PLAIN):
                waiting.append((value, depth + 1))
    return found


class KeptGenerators:
    """The generators that some objects keep, looked for again where there may be new ones.

    Args:
        roots: the objects.
    """

    def __init__(self, *roots: object) -> None:
        self._roots = roots
        self.found = self._search()

    def grew(self) -> bool:
        """Look again; whether there are generators that weren't there before."""
        before = {(id(holder), name) for holder, name in self.found}
        self.found = self._search()
        return any((id(holder), name) not in before for holder, name in self.found)

    def _search(self) -> list[KeptGenerator]:
        return [kept for root in self._roots for kept in find_generators(root)]


def _contents(holder: object) -> tuple[Any, list[tuple[Any, Any]]]:
    """What keeps the values of an object, and the values by name or number."""
    if isinstance(holder, list | tuple):
        return holder, list(enumerate(holder[:_MAX_ITEMS]))
    if type(holder) is dict:
        return holder, list(islice(holder.items(), _MAX_ITEMS))
    if isinstance(holder, MethodType):
        return (), [(0, holder.__self__)]
    if isinstance(holder, partial):
        return holder.keywords, [*holder.keywords.items(), (None, holder.func), (None, holder.args)]
    attributes = getattr(holder, "__dict__", None)
    return (attributes, list(attributes.items())) if isinstance(attributes, dict) else (holder, [])


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


def reseed(generator: Any, seed: int) -> None:
    """Bring a generator to where a fresh one of its kind starts; whoever holds it sees that."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        fresh = fresh_generator(generator, seed)
        if hasattr(generator, "bit_generator"):
            generator.bit_generator.state = fresh.bit_generator.state
        else:
            generator.set_state(fresh.get_state(legacy=False))


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
