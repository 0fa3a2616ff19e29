"""In which order a loader visits its samples: a function of (seed, loader, pass), never of history.

An order is drawn once at the start of a pass, from generators that nothing else uses, and can then be
entered at any position: indices are skipped, no sample is loaded. Three kinds cover every sampler:

- torch's own samplers give one sequence of indices that is cut into batches on demand;
- any other sampler of known length is run through once, and what it gave is kept;
- one of unknown length is run as batches are asked for.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from keepstep.train.data.generators import KeptGenerators, Replacement, fresh_generator
from keepstep.train.data.memory import PassMemory, sampler_parts
from keepstep.train.rng import PausedRandomness, isolated

__all__ = [
    "Chunked",
    "Listed",
    "Order",
    "Streamed",
    "ahead",
    "derive_seed",
    "draw_order",
]

_MASK = 0xFFFFFFFFFFFFFFFF
_DRAWN_BY_TORCH = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_END = object()
_AT_ONCE = 1 << 16


def derive_seed(*parts: int) -> int:
    """Mix integers into a seed of 63 bits. The same on every machine and in every version.

    Args:
        parts: integers, of which the lowest 64 bits count.
    """
    packed = 0
    for part in reversed(parts):
        packed = packed << 64 | (part & _MASK)
    mixed = hashlib.blake2b(packed.to_bytes(8 * len(parts), "little"), digest_size=8)
    return int.from_bytes(mixed.digest(), "little") >> 1


class Order(Protocol):
    """The indices of one pass, batch by batch."""

    @property
    def length(self) -> int | None:
        """Number of batches over all ranks, None while it isn't known."""
        ...

    def start_at(self, position: int) -> Iterator[Any]:
        """Yield the indices of batch `position`, position + 1, ... to the end."""
        ...

    def digest(self) -> str:
        """Tell orders apart: two that differ have different ones, as far as they are known by now."""
        ...


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """One sequence of indices, cut into batches of equal size."""

    indices: Sequence[Any]
    batch_size: int
    drop_last: bool

    @property
    def length(self) -> int:
        """Number of batches."""
        whole, rest = divmod(len(self.indices), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def start_at(self, position: int) -> Iterator[list[Any]]:
        """Yield batches from `position` on."""
        for batch in range(position, self.length):
            yield list(self.indices[batch * self.batch_size : (batch + 1) * self.batch_size])

    def digest(self) -> str:
        """Of the indices, and of how they are cut."""
        return f"{_digest(self.indices)}/{self.batch_size}/{self.drop_last}"


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What a sampler or batch sampler gave when it was run through."""

    items: Sequence[Any]

    @property
    def length(self) -> int:
        """Number of batches, or of samples when batches aren't collated."""
        return len(self.items)

    def start_at(self, position: int) -> Iterator[Any]:
        """Yield items from `position` on."""
        for item in range(position, len(self.items)):
            yield self.items[item]

    def digest(self) -> str:
        """Of all items."""
        return _digest(self.items)


class Streamed:
    """A sampler of unknown length, run as items are asked for.

    It looks one item ahead, so that the last one is known to be the last when it is given out.

    Args:
        sampler: any iterable of indices or of batches of indices.
        seed: of the generators that it draws from.
    """

    def __init__(self, sampler: Iterable[Any], seed: int) -> None:
        self._sampler = sampler
        self._seed = seed
        self.length: int | None = None

    def start_at(self, position: int) -> Iterator[Any]:
        """Yield items from `position` on; earlier ones are drawn and dropped."""
        drawn = 0
        memory = PassMemory(sampler_parts(self._sampler))
        for item, is_last in ahead(lambda: iter(self._sampler), [self._sampler], memory, self._seed):
            drawn += 1
            if is_last:
                self.length = drawn
            if drawn > position:
                yield item
        self.length = drawn

    def digest(self) -> str:
        """The same for all: nothing is drawn yet."""
        return ""


def ahead(
    begin: Callable[[], Iterator[Any]], holders: Sequence[object], memory: PassMemory, seed: int
) -> Iterator[tuple[Any, bool]]:
    """Yield items, read one ahead, each with whether it is the last.

    They are drawn from generators that nothing else uses, wherever the items are asked for.

    Args:
        begin: makes the iterator.
        holders: what may keep generators of its own, which are replaced meanwhile. If one is made by the
            first item, the iterator is made once more.
        memory: of what is iterated, to bring it back for that.
        seed: of the generators.
    """
    kept = KeptGenerators(*holders)
    at_start = memory.read()

    def open_it() -> tuple[Any, Any, Iterator[Any], Any]:
        randomness, replacement = PausedRandomness(seed), Replacement(kept.found, seed)
        with randomness, replacement:
            iterator = begin()
            return randomness, replacement, iterator, next(iterator, _END)

    opened: Any = open_it()
    if kept.grew():
        opened = None  # ends the first iterator before the second begins
        memory.write(at_start)
        opened = open_it()
    randomness, replacement, iterator, upcoming = opened
    del opened
    while upcoming is not _END:
        item = upcoming
        with randomness, replacement:
            upcoming = next(iterator, _END)
        yield item, upcoming is _END


def draw_order(sampler: Any, *, seed: int, pass_number: int) -> Order:
    """Draw the order of one pass.

    Args:
        sampler: a DataLoader's batch sampler, or its sampler when batches aren't collated.
        seed: of this pass of this loader.
        pass_number: passed to `set_epoch` of samplers that have it.
    """
    if type(sampler) is BatchSampler:
        inner = sampler.sampler
        if type(inner) in _DRAWN_BY_TORCH or type(inner) is SequentialSampler:
            return Chunked(
                indices=_draw_indices(inner, seed), batch_size=sampler.batch_size, drop_last=sampler.drop_last
            )
    if type(sampler) in _DRAWN_BY_TORCH or type(sampler) is SequentialSampler:
        return Listed(items=_draw_indices(sampler, seed))
    for part in sampler_parts(sampler):
        announce: Callable[[int], object] | None = getattr(part, "set_epoch", None)
        if announce is not None:
            announce(pass_number)
    if not _is_sized(sampler):
        return Streamed(sampler, seed)
    kept = KeptGenerators(sampler)
    memory = PassMemory(sampler_parts(sampler))
    at_start = memory.read()
    with isolated(seed), Replacement(kept.found, seed):
        items = list(sampler)
    if kept.grew():  # one that was made by this run is replaced in a second one
        memory.write(at_start)
        with isolated(seed), Replacement(kept.found, seed):
            items = list(sampler)
    return Listed(items=items)


def _draw_indices(sampler: Any, seed: int) -> Sequence[Any]:
    """Run one of torch's own samplers with a private generator; the user's is left untouched."""
    if type(sampler) is SequentialSampler:
        return range(len(sampler.data_source))
    mine = sampler.generator
    sampler.generator = fresh_generator(mine, seed)
    try:
        return list(sampler)
    finally:
        sampler.generator = mine


def _is_sized(sampler: Any) -> bool:
    try:
        len(sampler)
    except (TypeError, NotImplementedError, AttributeError):
        # A batch sampler around an unsized sampler has a __len__ that cannot answer.
        return False
    return True


def _digest(items: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    _absorb(items, found)
    return found.hexdigest()


def _absorb(items: Any, into: Any) -> None:
    """Of what is neither a number nor text only the type counts: it may look different in each process."""
    if isinstance(items, range | str | int | float):
        into.update(f"{items!r};".encode())
    elif isinstance(items, list | tuple):
        try:
            for begin in range(0, len(items), _AT_ONCE):
                into.update(array("q", items[begin : begin + _AT_ONCE]))
        except (TypeError, OverflowError):
            for item in items:
                _absorb(item, into)
        into.update(f"{len(items)};".encode())
    else:
        into.update(f"{type(items).__qualname__};".encode())
