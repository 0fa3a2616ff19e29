"""Which tensors of a group share a file: those that change apart from those that don't.

A file is linked to the one before only if all of it is unchanged. Frozen parameters have files of their own
from the start. Beyond that the grouping learns: tensors that stay the same over two saves, beside others
that change, move to a file of their own, once; one that changes there moves back. Moving costs one write,
so it has to be worth one, and nothing moves more than twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from keepstep.checkpoint.format.manifest import TensorEntry
from keepstep.checkpoint.saving.layout import Layout, TensorInfo
from keepstep.checkpoint.saving.linking import LINKED_FROM_BYTES

__all__ = ["Grouping"]

_SETTLED_AFTER = 2
"""Saves without a change after which a tensor may move."""
_MOST_MOVES = 2
_LEAST_SHARE = 0.05
_FROZEN = 1


class Grouping:
    """Labels of tensors; those of a group with the same label share files.

    0 is for what changes, 1 for parameters that are frozen, larger numbers for what turned out to rest.
    """

    def __init__(self) -> None:
        self._learned: dict[str, int] = {}
        self._resting = {_FROZEN}
        self._unchanged_for: Counter[str] = Counter()
        self._moves: Counter[str] = Counter()

    def labels(self, tensors: Sequence[TensorInfo]) -> list[int]:
        """The label of each tensor."""
        frozen = _groups_worth_splitting(tensors)
        return [
            self._learned.get(tensor.address, _FROZEN if tensor.frozen and tensor.group in frozen else 0)
            for tensor in tensors
        ]

    def adopt(self, tensors: Mapping[str, TensorEntry]) -> None:
        """Begin with the grouping of a checkpoint that was loaded; `tensors` is its index, by address."""
        files = {
            address: (address.partition("/")[0], entry.file)
            for address, entry in tensors.items()
            if entry.file is not None
        }
        number = {file: n for n, file in enumerate(sorted({file for _, file in files.values()}))}
        in_group: dict[str, set[str]] = defaultdict(set)
        for group, file in files.values():
            in_group[group].add(file)
        self._learned = {
            address: _FROZEN + 1 + number[file]
            for address, (group, file) in files.items()
            if len(in_group[group]) > 1
        }

    def observe(self, layout: Layout, tensors: Sequence[TensorInfo], unchanged: Mapping[int, bool]) -> bool:
        """Learn from a committed save.

        Args:
            layout: of the save.
            tensors: that were planned.
            unchanged: for each stored tensor, whether it is as in the save before.

        Returns:
            Whether the next save is to be grouped in another way.
        """
        moved = False
        for segment in layout.segments:
            same = [p.index for p in segment.placements if unchanged.get(p.index, False)]
            if len(same) == len(segment.placements):
                continue
            for placement in segment.placements:
                if not unchanged.get(placement.index, False):
                    moved |= self._woke_up(tensors[placement.index])
            settled = [tensors[index] for index in same if self._has_settled(tensors[index])]
            if sum(t.bytes for t in settled) >= max(LINKED_FROM_BYTES, _LEAST_SHARE * segment.bytes):
                self._move(settled)
                moved = True
        return moved

    def _woke_up(self, tensor: TensorInfo) -> bool:
        self._unchanged_for.pop(tensor.address, None)
        if not self._rests(tensor):
            return False
        self._learned[tensor.address] = 0
        self._moves[tensor.address] += 1
        return True

    def _has_settled(self, tensor: TensorInfo) -> bool:
        self._unchanged_for[tensor.address] += 1
        return (
            self._unchanged_for[tensor.address] >= _SETTLED_AFTER
            and self._moves[tensor.address] < _MOST_MOVES
            and not self._rests(tensor)
        )

    def _rests(self, tensor: TensorInfo) -> bool:
        return self._learned.get(tensor.address, _FROZEN if tensor.frozen else 0) in self._resting

    def _move(self, tensors: Iterable[TensorInfo]) -> None:
        label = max([_FROZEN, *self._learned.values()]) + 1
        self._resting.add(label)
        for tensor in tensors:
            self._learned[tensor.address] = label
            self._moves[tensor.address] += 1


def _groups_worth_splitting(tensors: Sequence[TensorInfo]) -> set[str]:
    """Groups with a fair amount of frozen parameters, and others beside them."""
    frozen: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.frozen:
            frozen[tensor.group] += tensor.bytes
    changing = {tensor.group for tensor in tensors if not tensor.frozen} if frozen else set()
    return {group for group, size in frozen.items() if size >= LINKED_FROM_BYTES and group in changing}
