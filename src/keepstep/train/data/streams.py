"""Batches of what has no positions: iterable data sets, and loaders with an iteration of their own.

A stream is run from its start up to the position that is wanted (`ReplayedSource`). If it can say where it
is, by `state_dict` and `load_state_dict`, it is asked and told instead (`StatefulSource`).
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from keepstep.train.data.batches import announce_pass
from keepstep.train.data.generators import KeptGenerator, KeptGenerators, Replacement, reseed
from keepstep.train.data.memory import PassMemory
from keepstep.train.data.order import ahead, derive_seed
from keepstep.train.data.parcels import packed_text, unpacked_text
from keepstep.train.data.shares import ALL_OF_IT
from keepstep.train.passes import Cursor
from keepstep.train.rng import isolated

__all__ = ["ReplayedSource", "StatefulSource"]

_log = logging.getLogger(__name__)
_END = object()


class ReplayedSource:
    """Batches of a loader that cannot seek: a position is reached by running up to it.

    The loader runs under generators of its own, so its randomness is the same at every attempt as long as
    the number of workers is. Workers start anew with each pass: those that went on would go on with what
    they drew and counted, too.

    Args:
        loader: the user's.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = _with_new_workers(loader)
        # What workers count is over with them. A stream within one that can't be asked isn't asked either:
        # the pass is run from its start, and the state at the end of the last one may lead to nothing more.
        self._memory = PassMemory([] if loader.num_workers else _streams_in(loader.dataset), asked=False)
        self.share = ALL_OF_IT

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield the batches of one pass from the cursor's position on."""
        start = cursor.position
        announce_pass(self._loader.dataset, cursor.pass_number)
        if start:
            _log.warning(
                "Replaying %d batches to reach the one to begin with: this data can't be entered there. "
                "A dataset with state_dict and load_state_dict, in a loader with num_workers=0, can.",
                start,
            )
        holders = [self._loader.dataset, self._loader.collate_fn]
        batches = ahead(lambda: _opened(self._loader, seed), holders, self._memory, seed)
        for drawn, (batch, is_last) in enumerate(batches, 1):
            if is_last:
                cursor.length = drawn
            if drawn > start:
                yield batch

    def memory(self) -> list[dict[str, Any]]:
        """What the data set counts."""
        return self._memory.read()

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Bring the data set to where `memory` was read."""
        self._memory.write(memory)

    def bookmark(self) -> str | None:
        """Nothing: only running it leads to a position."""
        return None

    def go_to(self, bookmark: str | None) -> None:
        """Do nothing."""


class StatefulSource:
    """Batches of a stream that can say where it is.

    It is asked after each batch, since the stream is always read one batch ahead. So that what it draws at
    random doesn't depend on where it was entered, each batch is read under generators seeded for it alone.

    Args:
        loader: the user's.
        stateful: what is asked: the data set, or a loader that has a state of its own.
    """

    def __init__(self, loader: DataLoader[Any], stateful: Any) -> None:
        self._loader = loader
        self._stateful = stateful
        self.share = ALL_OF_IT
        self._bookmark: str | None = None
        self._wanted: dict[str, Any] | None = None
        self._under_way = 0

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield the batches of one pass from the cursor's position on."""
        self._under_way += 1
        this = self._under_way
        try:
            yield from self._read(cursor, seed)
        except GeneratorExit:
            if this == self._under_way:
                self._step_back()
            raise

    def _read(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        kept = KeptGenerators(self._loader.dataset, self._loader.collate_fn)
        announce_pass(self._loader.dataset, cursor.pass_number)
        with isolated(seed), Replacement(kept.found, seed):
            reached, entered = self._enter(cursor)
        if reached is None:
            cursor.length = cursor.position
            return
        read: Any = self._reader(cursor, kept, seed)
        upcoming, mark = read(reached)
        if kept.grew():  # one that was made by this batch is replaced while it is read again
            read = None  # ends the first iterator before the second begins
            self._stateful.load_state_dict(unpacked_text(entered))
            read = self._reader(cursor, kept, seed)
            upcoming, mark = read(reached)
        while upcoming is not _END:
            batch, behind = upcoming, mark
            reached += 1
            upcoming, mark = read(reached)
            if upcoming is _END:
                # A stream that resets itself at its end may have done so with its last, short batch.
                cursor.length, behind = reached, mark
            if reached > cursor.position:
                self._bookmark = behind
                yield batch

    def _reader(self, cursor: Cursor, kept: KeptGenerators, seed: int) -> Callable[[int], tuple[Any, str]]:
        """Open the stream; what is returned reads a unit, given its number, and says what is behind it."""
        replacement = Replacement(kept.found, seed)
        with isolated(seed), replacement:
            iterator = _opened(self._loader, seed)

        def read(number: int) -> tuple[Any, str]:
            unit_seed = derive_seed(seed, number)
            with isolated(unit_seed), replacement:
                _reseed_all(kept.found, unit_seed)
                batch = next(iterator, _END)
                return batch, self._mark(cursor, number, ended=batch is _END)

        return read

    def _enter(self, cursor: Cursor) -> tuple[int | None, str]:
        """Bring the stream to the bookmark, if that helps.

        Returns:
            The position that it is at, None for its end; and its state there, as text.
        """
        wanted, self._wanted = self._wanted, None
        if wanted is None or wanted["pass"] != cursor.pass_number or wanted["position"] > cursor.position:
            return 0, packed_text(self._stateful.state_dict())
        self._stateful.load_state_dict(unpacked_text(wanted["state"]))
        return None if wanted["ended"] else int(wanted["position"]), wanted["state"]

    def _mark(self, cursor: Cursor, read: int, *, ended: bool) -> str:
        place = {"pass": cursor.pass_number, "position": read if ended else read + 1, "ended": ended}
        return json.dumps({**place, "state": packed_text(self._stateful.state_dict())})

    def _step_back(self) -> None:
        """A stream goes on where its last batch ended, not where reading ahead has led it."""
        if self._stateful is not self._loader and self._bookmark is not None:
            self._stateful.load_state_dict(unpacked_text(json.loads(self._bookmark)["state"]))

    def memory(self) -> list[dict[str, Any]]:
        """The state of the stream between passes."""
        return [{"stream": packed_text(self._stateful.state_dict())}]

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Bring the stream to where `memory` was read."""
        if memory and "stream" in memory[0]:
            self._stateful.load_state_dict(unpacked_text(memory[0]["stream"]))

    def bookmark(self) -> str | None:
        """The state of the stream after the batch that was given out last."""
        return self._bookmark

    def go_to(self, bookmark: str | None) -> None:
        """Enter the next pass by a bookmark."""
        self._bookmark = bookmark
        self._wanted = None if bookmark is None else json.loads(bookmark)


def _with_new_workers(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader itself, or one like it, of whatever class, whose workers end with each pass."""
    if not loader.persistent_workers:
        return loader
    other = copy.copy(loader)
    # Frozen, since workers that run would not heed it; this one has none yet.
    object.__setattr__(other, "persistent_workers", False)
    other._iterator = None
    return other


def _streams_in(dataset: Any) -> list[Any]:
    """A data set and the iterable ones in it, outermost first."""
    parts: list[Any] = []
    waiting = [dataset]
    while waiting:
        part = waiting.pop(0)
        if any(part is seen for seen in parts):
            continue
        parts.append(part)
        for value in getattr(part, "__dict__", {}).values():
            inner = value if isinstance(value, list | tuple) else [value]
            waiting += [item for item in inner if isinstance(item, IterableDataset)]
    return parts


def _opened(loader: DataLoader[Any], seed: int) -> Iterator[Any]:
    mine = loader.generator
    if mine is not None:
        loader.generator = torch.Generator().manual_seed(seed)
    try:
        return iter(loader)
    finally:
        loader.generator = mine


def _reseed_all(kept: list[KeptGenerator], seed: int) -> None:
    for number, (holder, name) in enumerate(kept):
        reseed(holder[name], seed + number)
