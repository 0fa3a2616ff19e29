"""Segments as blocks to be filled, and blocks in the order in which they were taken."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from keepstep.checkpoint.saving.layout import Placement, Segment
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, Block
from keepstep.files import SegmentFile

__all__ = ["Job", "Line", "OpenSegment", "Piece"]

Job = tuple[int, int]
"""A block to fill: the number of its segment, and where it begins there."""


class Piece(NamedTuple):
    """Part of a tensor inside a block: tensor bytes begin..end lie at `at` in the block."""

    placement: Placement
    begin: int
    end: int
    at: int


class OpenSegment:
    """A segment being written: opened with its first block, closed with its last."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.ends = [p.offset + p.bytes for p in segment.placements]
        self.blocks_left = -(-segment.bytes // BLOCK_BYTES)
        self.file: SegmentFile | None = None
        self.lock = threading.Lock()
        self.within: str | None = None

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        placements = self.segment.placements
        for index in range(bisect.bisect_right(self.ends, begin), len(placements)):
            placement = placements[index]
            if placement.offset >= end:
                return
            first = max(begin, placement.offset)
            last = min(end, placement.offset + placement.bytes)
            if first < last:
                yield Piece(placement, first - placement.offset, last - placement.offset, first - begin)


class Line:
    """Blocks that two threads fill, handed on in the order in which they were taken.

    Hashing follows that order: handed on in any other, all threads could wait for a part that none has.
    """

    def __init__(self, hand_over: Callable[[Job, Block], None]) -> None:
        self.taking = threading.Lock()
        self._hand_over = hand_over
        self._joined = 0
        self._gone = 0
        self._ready: dict[int, tuple[Job, Block]] = {}
        self._moving = threading.Lock()

    def join(self) -> int:
        """The place of the block that was just taken; call it with `taking` held."""
        self._joined += 1
        return self._joined - 1

    def ready(self, place: int, job: Job, block: Block) -> None:
        """Hand on a filled block, and those behind it that waited for it."""
        with self._moving:
            self._ready[place] = job, block
            while (item := self._ready.pop(self._gone, None)) is not None:
                self._gone += 1
                self._hand_over(*item)

    def left(self) -> list[Block]:
        """Blocks that will never be handed on, as one before them failed."""
        return [block for _, block in self._ready.values()]
