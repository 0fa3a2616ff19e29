"""Which part of a pass falls to one of several ranks; pure.

A pass is a sequence of *units*: the batches that the user's batch sampler makes, numbered from 0 and the same
on every rank. In each step every rank gets one batch. Without `split` a step takes as many units as there are
ranks, one each; with it a step takes one unit and cuts it into equal parts. So a position in a pass, counted
in units, means the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from keepstep.errors import UsageError
from keepstep.train.data.order import Order

__all__ = ["ALL_OF_IT", "Plan", "Portion", "Share", "check_split"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """How a pass is shared out, and which share is this rank's.

    Args:
        rank: this process, 0 to size - 1.
        size: how many ranks there are.
        split: each unit is cut into equal parts, instead of each rank getting whole ones.
        even: all ranks get the same number of batches of the same size; what is missing at the end is filled
            with samples from the beginning of the pass.
    """

    rank: int = 0
    size: int = 1
    split: bool = False
    even: bool = True

    @property
    def stride(self) -> int:
        """Units that a step takes."""
        return 1 if self.split else self.size

    def batches(self, units: int, drop_last: bool) -> int:
        """How many batches this rank gets of a pass of so many units, begun at the first."""
        whole, rest = divmod(units, self.stride)
        if not rest or drop_last:
            return whole
        return whole + (1 if self.even or self.rank < rest else 0)


ALL_OF_IT = Share()
"""The share of a process that trains alone."""


class Portion(NamedTuple):
    """What a rank loads in one step.

    Attributes:
        unit: number of the unit that it is, or is part of; beyond the last one if it only fills up.
        part: number of the part of a unit that was split; None for a whole one.
        indices: as the sampler gave them.
    """

    unit: int
    part: int | None
    indices: Any


class Plan:
    """The portions of one rank in what is left of a pass.

    Attributes:
        end: the position, in units, after this rank's last batch; None while it isn't known.
        remainder: how many samples of the last step, over all ranks, are no fillers, where that step is
            smaller than the others or was filled up; 0 where it is a full one; -1 while it isn't known.

    Args:
        order: of the pass.
        share: this rank's.
        batch_size: of a full unit; None where units differ in size, or are single samples.
        drop_last: a last step for which there is too little is left out.
        start: the unit to begin with.
    """

    def __init__(
        self, order: Order, share: Share, *, batch_size: int | None, drop_last: bool, start: int
    ) -> None:
        self._order = order
        self._share = share
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._start = start
        self._end: int | None = None
        self.remainder = -1
        units = order.length
        if units is not None:
            group = self._last_group(units)
            self._settle(units, [_unit(order, number) for number in group], group.start)

    @property
    def end(self) -> int | None:
        return self._order.length if self._share.size == 1 else self._end

    def portions(self) -> Iterator[Portion]:
        """Yield what this rank loads, step by step."""
        if self._share.size == 1:
            for number, indices in enumerate(self._order.start_at(self._start), self._start):
                yield Portion(number, None, indices)
        elif self._order.length is None:
            yield from self._as_drawn()
        else:
            yield from self._from_known(self._order.length)

    def _from_known(self, units: int) -> Iterator[Portion]:
        group = self._last_group(units)
        stride, order = self._share.stride, self._order
        for first in range(self._start, group.start, stride):
            number = first + self._share.rank % stride
            yield from self._inner(number, _unit(order, number))
        last = [_unit(order, number) for number in group]
        yield from self._final(group.start, last, [_unit(order, n) for n in range(min(stride, units))])

    def _as_drawn(self) -> Iterator[Portion]:
        """As `_from_known`, a step behind: only when the next one was drawn it isn't the last."""
        stride = self._share.stride
        begin: list[Any] = []
        held: list[Any] = []
        units = 0
        for units, unit in enumerate(self._order.start_at(0), 1):
            if units <= stride:
                begin.append(unit)
            if units <= self._start:
                continue
            held.append(unit)
            if len(held) == 2 * stride:
                number = units - 2 * stride + self._share.rank % stride
                yield from self._inner(number, held[self._share.rank % stride])
                del held[:stride]
        group = self._last_group(units)
        for first in range(max(units - len(held), self._start), group.start, stride):
            own = self._share.rank % stride
            yield from self._inner(first + own, held[own])
            del held[:stride]
        self._settle(units, held[: len(group)], group.start)
        yield from self._final(group.start, held[: len(group)], begin)

    def _last_group(self, units: int) -> range:
        """The units of the last step; none if nothing is left."""
        left = max(units - self._start, 0)
        stride = self._share.stride
        steps = left // stride if self._drop_last else -(-left // stride)
        first = self._start + max(steps - 1, 0) * stride
        return range(first, min(first + stride, units)) if steps else range(first, first)

    def _settle(self, units: int, group: Sequence[Any], first: int) -> None:
        """Note where the pass ends, given its last step."""
        if not group:
            self._end, self.remainder = min(self._start, units), 0
            return
        sizes = [_size(unit) for unit in group]
        full = (self._batch_size or max(sizes)) * self._share.stride
        known = all(size > 0 for size in sizes)
        self.remainder = -1 if not known else sum(sizes) if sum(sizes) < full else 0
        present = self._share.even or self._own_part(group) is not None
        self._end = first + len(group) if present else first

    def _own_part(self, group: Sequence[Any]) -> Any | None:
        """What falls to this rank of an unfilled last step; None for nothing."""
        if not self._share.split:
            return group[self._share.rank] if self._share.rank < len(group) else None
        part = self._cut(list(group[0]))
        return part or None

    def _inner(self, number: int, unit: Any) -> Iterator[Portion]:
        """A step that is not the last."""
        if self._share.split:
            # A batch sampler may give short units in between; every rank has to get a part of each.
            unit = self._cut(_filled(unit, unit, self._batch_size or 0))
        yield self._portion(number, unit)

    def _final(self, first: int, group: Sequence[Any], begin: Sequence[Any]) -> Iterator[Portion]:
        """The last step, filled up from the pass's first units if ranks are to be even."""
        if not group:
            return
        share = self._share
        number = first if share.split else first + share.rank
        if not share.even:
            unit = self._own_part(group)
        elif share.split:
            unit = self._cut(_filled(group[0], begin[0], self._batch_size or 0))
        else:
            unit = self._even_unit(group, begin)
        if unit is not None:
            yield self._portion(number, unit)

    def _even_unit(self, group: Sequence[Any], begin: Sequence[Any]) -> Any:
        rank, size = self._share.rank, self._batch_size
        if size is None:
            return group[rank] if rank < len(group) else begin[(rank - len(group)) % len(begin)]
        if rank < len(group) - 1:
            return group[rank]
        samples = [index for unit in begin for index in unit]
        last = list(group[-1])
        if rank == len(group) - 1:
            return _filled(last, samples, size)
        used = max(size - len(last), 0) + (rank - len(group)) * size
        return [samples[(used + offset) % len(samples)] for offset in range(size)]

    def _cut(self, unit: list[Any]) -> list[Any]:
        length = (self._batch_size or 0) // self._share.size
        return unit[length * self._share.rank : length * (self._share.rank + 1)]

    def _portion(self, number: int, indices: Any) -> Portion:
        return Portion(unit=number, part=self._share.rank if self._share.split else None, indices=indices)


def check_split(share: Share, batch_size: int | None) -> None:
    """Refuse batches that can't be cut into equal parts.

    Raises:
        UsageError: naming both numbers.
    """
    if not share.split or share.size == 1:
        return
    if batch_size is None:
        raise UsageError(
            f"split_batches=True cuts each batch into {share.size} equal parts, one for each rank, but the "
            "loader and its batch sampler have no batch_size. Give the batch sampler a batch_size that is a "
            f"multiple of {share.size}, or use split_batches=False."
        )
    if batch_size % share.size:
        raise UsageError(
            f"split_batches=True cuts each batch into equal parts, one for each rank, but the batch size is "
            f"{batch_size} and there are {share.size} ranks. Use a multiple of {share.size}, or "
            "split_batches=False."
        )


def _unit(order: Order, number: int) -> Any:
    return next(order.start_at(number))


def _size(unit: Any) -> int:
    """Samples in a unit; 0 for a single one that stands for itself."""
    return len(unit) if isinstance(unit, list | tuple) else 0


def _filled(unit: Any, samples: Sequence[Any], size: int) -> list[Any]:
    filled = list(unit)
    missing = max(size - len(filled), 0)
    return filled + [samples[offset % len(samples)] for offset in range(missing)]
