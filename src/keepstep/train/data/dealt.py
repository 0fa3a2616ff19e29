"""Streams shared out between ranks, step by step: each rank runs its own, or rank 0 reads for all.

Both deal out the same batches (`dealing.py`), read from a source that knows nothing of ranks. They look one
step ahead, so that a step is known to be the last when it is given out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from keepstep.errors import RankError, RankFailedError, UsageError
from keepstep.train.data.agreement import check_alike
from keepstep.train.data.batches import BatchSource
from keepstep.train.data.dealing import NOTHING, CannotCutError, deal
from keepstep.train.data.parcels import digest, pack, unpack
from keepstep.train.data.shares import Share
from keepstep.train.passes import Cursor
from keepstep.world import World

__all__ = ["DispatchedSource", "SharedSource"]

_NO_DATA = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What all ranks get at once.

    Attributes:
        batches: by rank; NOTHING for a rank whose pass is over.
        ends: by rank: the position after its last batch if this is that one, else None.
        remainder: samples in a last step that are no fillers; see `shares.Plan`.
        bookmark: of the source after this step.
    """

    batches: list[Any]
    ends: list[int | None]
    remainder: int
    bookmark: str | None


class _Dealer:
    """Reads a source and deals out what it gives."""

    def __init__(
        self, source: BatchSource, share: Share, drop_last: bool, check: Callable[[list[Any]], None]
    ) -> None:
        self._source = source
        self._check = check
        self._share = share
        self._drop_last = drop_last and not share.split

    def steps(self, cursor: Cursor, seed: int) -> Generator[_Step]:
        """Yield the steps of a pass from the cursor's position on."""
        inner = Cursor(cursor.index, cursor.pass_number, cursor.position)
        groups = self._groups(inner, seed)
        position = cursor.position
        units, bookmark = next(groups, ([], None))
        self._check(units)
        while units:
            upcoming, next_bookmark = next(groups, ([], None))
            position += len(units)
            share = self._share
            batches, remainder = self._dealt(units)
            # With uneven ranks those get nothing more that the next step, the last one, doesn't reach.
            reached = share.size if upcoming and (share.even or share.split) else len(upcoming)
            ends = [None if rank < reached else position for rank in range(share.size)]
            yield _Step(
                batches=batches,
                ends=ends,
                remainder=-1 if upcoming else remainder,
                bookmark=bookmark,
            )
            units, bookmark = upcoming, next_bookmark

    def _groups(self, inner: Cursor, seed: int) -> Iterator[tuple[list[Any], str | None]]:
        """The units of each step, with the bookmark behind them."""
        group: list[Any] = []
        for unit in self._source.batches(inner, seed):
            group.append(unit)
            if len(group) == self._share.stride:
                yield group, self._source.bookmark()
                group = []
        if group and not self._drop_last:
            yield group, self._source.bookmark()

    def _dealt(self, units: list[Any]) -> tuple[list[Any], int]:
        share = self._share
        try:
            return deal(units, share.size, split=share.split, even=share.even)
        except CannotCutError as error:
            raise UsageError(
                f"split_batches=True cuts each batch into {share.size} parts, one for each rank, but this "
                f"batch can't be cut: {error}. Collate to tensors with one row for each sample, or use "
                "split_batches=False."
            ) from error


class _Dealt:
    """What both kinds have in common: the source's memory, and a bookmark of what was given out."""

    def __init__(self, source: BatchSource, share: Share, world: World, *, drop_last: bool) -> None:
        self._source = source
        self.share = share
        self._world = world
        self._drop_last = drop_last
        self._bookmark: str | None = None

    def _begin(self, cursor: Cursor, seed: int) -> _Dealer:
        facts = {
            "the number of the pass": cursor.pass_number,
            "the first batch": cursor.position,
            "the seed": seed,
        }
        check_alike(self._world, cursor.index, facts)
        return _Dealer(self._source, self.share, self._drop_last, lambda units: self._check(cursor, units))

    def _check(self, cursor: Cursor, units: list[Any]) -> None:
        """Look at the first units of a pass."""

    def _leave(self, steps: Generator[_Step]) -> None:
        """End a pass early: the source steps back to the step given out last, not to the one read ahead."""
        self._source.go_to(self._bookmark)
        steps.close()

    def memory(self) -> list[dict[str, Any]]:
        """What the source remembers now."""
        return self._source.memory()

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Bring the source to where `memory` was read."""
        self._source.remember(memory)

    def bookmark(self) -> str | None:
        """Of the source, after the step that was given out last."""
        return self._bookmark

    def go_to(self, bookmark: str | None) -> None:
        """Enter the source by a bookmark."""
        self._bookmark = bookmark
        self._source.go_to(bookmark)


class SharedSource(_Dealt):
    """Every rank runs the same stream and takes its share.

    Args:
        source: of the whole stream.
        share: of this rank.
        world: all ranks.
        drop_last: a last step with too few units for all ranks is left out.
    """

    def _check(self, cursor: Cursor, units: list[Any]) -> None:
        """A stream that splits itself by rank is another one on each."""
        check_alike(self._world, cursor.index, {"what the data set gives first": digest(units)})

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield this rank's batches of one pass from the cursor's position on."""
        rank = self.share.rank
        begun = False
        steps = self._begin(cursor, seed).steps(cursor, seed)
        try:
            for step in steps:
                begun = True
                if step.batches[rank] is NOTHING:
                    break
                cursor.length, cursor.remainder = step.ends[rank], step.remainder
                self._bookmark = step.bookmark
                yield step.batches[rank]
                if cursor.length is not None:
                    break
        except GeneratorExit:
            self._leave(steps)
            raise
        if not begun or cursor.length is None:
            cursor.length = cursor.position


class DispatchedSource(_Dealt):
    """Rank 0 reads and hands every rank its share; the others load nothing.

    Args:
        source: of the whole stream.
        share: of this rank.
        world: all ranks.
        drop_last: a last step with too few units for all ranks is left out.
    """

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield this rank's batches of one pass from the cursor's position on."""
        dealer = self._begin(cursor, seed)
        return self._read(dealer, cursor, seed) if self.share.rank == 0 else self._receive(cursor)

    def _read(self, dealer: _Dealer, cursor: Cursor, seed: int) -> Iterator[Any]:
        waiting = list(range(1, self.share.size))
        steps = dealer.steps(cursor, seed)
        while cursor.length is None:
            try:
                step = next(steps, None)
                parcels = self._parcels(step, cursor)
            except Exception as error:
                # Not what ends the process: the others hear of that as it goes.
                reason = f"{type(error).__name__}: {error}"
                with suppress(RankError):
                    self._hand_out({rank: (_words(failed=reason), _NO_DATA) for rank in waiting})
                raise
            self._hand_out({rank: parcels[rank] for rank in waiting})
            if step is None:
                cursor.length = cursor.position
                return
            waiting = [rank for rank in waiting if step.ends[rank] is None]
            cursor.length, cursor.remainder = step.ends[0], step.remainder
            self._bookmark = step.bookmark
            try:
                yield step.batches[0]
            except GeneratorExit:
                self._leave(steps)
                raise

    def _parcels(self, step: _Step | None, cursor: Cursor) -> list[tuple[bytes, torch.Tensor]]:
        if step is None:
            return [(_words(over=cursor.position), _NO_DATA)] * self.share.size
        parcels = []
        packed: dict[int, tuple[bytes, torch.Tensor]] = {}
        for batch, end in zip(step.batches, step.ends, strict=True):
            if batch is NOTHING:
                parcels.append((_words(over=end), _NO_DATA))
                continue
            if id(batch) not in packed:
                packed[id(batch)] = pack(batch)
            text, data = packed[id(batch)]
            parcels.append((_words(end=end, remainder=step.remainder) + b"\n" + text, data))
        return parcels

    def _hand_out(self, parcels: dict[int, tuple[bytes, torch.Tensor]]) -> None:
        self._world.scatter([parcels.get(rank) for rank in range(self.share.size)])

    def _receive(self, cursor: Cursor) -> Iterator[Any]:
        while cursor.length is None:
            text, data = self._world.scatter(None)
            head, _, body = text.partition(b"\n")
            words = json.loads(head)
            if "failed" in words:
                raise RankFailedError(
                    f"rank 0 failed while it read data for all ranks: {words['failed']}", rank=0
                )
            if "over" in words:
                cursor.length = words["over"]
                return
            cursor.length, cursor.remainder = words["end"], words["remainder"]
            yield unpack(body, data)


def _words(**facts: Any) -> bytes:
    return json.dumps(facts).encode()
