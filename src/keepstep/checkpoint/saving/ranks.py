"""Which rank writes what: a pure function of what each rank holds. What they wrote: `reports.py`.

Tensors that every rank holds are split between the ranks, balanced by bytes, so that each is written once.
Shards are written by a rank that holds them, cut along their first dimension into chunks of at most 64 MiB:
a chunk has one digest, so whoever needs a part of it later reads all of it.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from keepstep.checkpoint.format.boxes import Box, problem_of_tiling
from keepstep.checkpoint.format.manifest import Chunk, TensorEntry
from keepstep.checkpoint.saving.layout import Alias, Layout, TensorInfo, plan, segment_of
from keepstep.errors import RanksDifferError

__all__ = [
    "CHUNK_BYTES",
    "SHARE_BYTES",
    "Plan",
    "Shard",
    "Share",
    "by_piece",
    "differences",
    "layout_of",
    "plan_ranks",
    "problem_of_pieces",
]

CHUNK_BYTES = 64 << 20
SHARE_BYTES = 16 << 20
SMALL_BYTES = 64 << 10
"""A group is split between no more ranks than have so much of it to write each."""


class Shard(NamedTuple):
    """A box of a tensor that a rank holds.

    Attributes:
        address, group, name, dtype, itemsize: see `TensorInfo`.
        whole: shape of the whole tensor.
        at: where the box begins.
        shape: of the box.
        frozen: see `TensorInfo`.
    """

    address: str
    group: str
    name: str
    dtype: str
    itemsize: int
    whole: tuple[int, ...]
    at: tuple[int, ...]
    shape: tuple[int, ...]
    frozen: bool = False

    @property
    def label(self) -> str:
        """What tells the box from others of its tensor; nothing if it is the whole tensor."""
        return "" if self.shape == self.whole else label_at(self.at)

    @property
    def info(self) -> TensorInfo:
        """The box as a tensor to lay out."""
        return TensorInfo(
            address=self.address + self.label,
            group=self.group,
            name=self.name + self.label,
            dtype=self.dtype,
            shape=self.shape,
            itemsize=self.itemsize,
            bytes=math.prod(self.shape) * self.itemsize,
            frozen=self.frozen,
        )

    def pieces(self, most_bytes: int = CHUNK_BYTES) -> list[Shard]:
        """The box cut along its first dimension; a whole tensor stays whole, an empty box gives none.

        Of a tensor without elements there is one piece, at its beginning.
        """
        if self.shape == self.whole:
            return [self]
        if not math.prod(self.whole):
            return [] if any(self.at) else [self._replace(shape=self.whole)]
        if not math.prod(self.shape):
            return []
        row_bytes = math.prod(self.shape[1:]) * self.itemsize
        rows = max(1, most_bytes // row_bytes)
        return [
            self._replace(
                at=(self.at[0] + begin, *self.at[1:]),
                shape=(min(rows, self.shape[0] - begin), *self.shape[1:]),
            )
            for begin in range(0, self.shape[0], rows)
        ]


def label_at(at: Sequence[int]) -> str:
    """Where a box begins, as it is put behind names: "@8,0"."""
    return f"@{','.join(map(str, at))}"


def by_piece(
    tensors: Mapping[str, TensorEntry],
) -> Iterator[tuple[str, TensorEntry, TensorEntry | Chunk]]:
    """What an index says is stored, each chunk for itself: its address as of `Shard.info`, its tensor, it."""
    for address, entry in tensors.items():
        if entry.chunks:
            for chunk in entry.chunks:
                yield address + label_at(chunk.at), entry, chunk
        elif entry.file is not None:
            yield address, entry, entry


class Share(NamedTuple):
    """One file that a rank writes: tensors by their number among those the rank holds."""

    file: str
    members: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who writes what.

    Attributes:
        shares: for each rank its files. Numbers below the number of replicated tensors are those, numbers
            above count the rank's own pieces of shards.
        indexes: the small `*.index.json` files, which rank 0 writes.
        tensors: of all ranks, pieces of shards as `Shard.info`.
        layout: of these in the files of all ranks.
    """

    shares: Sequence[Sequence[Share]]
    indexes: Mapping[str, bytes]
    tensors: Sequence[TensorInfo]
    layout: Layout

    @property
    def aliases(self) -> tuple[Alias, ...]:
        """Replicated tensors that share memory with others."""
        return self.layout.aliases

    @property
    def bytes(self) -> int:
        """Size of all files of the shares."""
        return self.layout.bytes


def plan_ranks(
    replicated: Sequence[TensorInfo],
    pieces: Sequence[Sequence[Shard]],
    *,
    labels: Callable[[Sequence[TensorInfo]], Sequence[int]] | None = None,
) -> Plan:
    """Decide for all ranks. Deterministic: same arguments, same plan.

    Args:
        replicated: what every rank holds.
        pieces: for each rank, the pieces of shards that it holds.
        labels: gives each tensor its label, see `layout.plan`; who writes it does not depend on that. None:
            all are alike.

    Raises:
        RanksDifferError: the ranks' shards don't make up whole tensors.
    """
    size = len(pieces)
    loads = [0] * size
    owned = _own_pieces(pieces, loads)
    owners = _split(replicated, loads)
    infos = [*replicated, *(pieces[rank][number].info for rank, number in owned)]
    numbers = [*range(len(replicated)), *(len(replicated) + number for _, number in owned)]
    owners += [rank for rank, _ in owned]
    kinds = labels(infos) if labels is not None else [0] * len(infos)
    sticky = [kind * size + owner for kind, owner in zip(kinds, owners, strict=True)]
    sharded = {
        number for number, (rank, index) in enumerate(owned, len(replicated)) if pieces[rank][index].label
    }
    found = _lay_out(infos, owners, size, labels=sticky, sharded=sharded)
    shares = [
        [Share(share.file, tuple(numbers[member] for member in share.members)) for share in of_rank]
        for of_rank in found.shares
    ]
    return replace(found, shares=shares)


def _lay_out(
    infos: Sequence[TensorInfo],
    owners: Sequence[int],
    size: int,
    *,
    labels: Sequence[int],
    sharded: Container[int],
) -> Plan:
    """Files for tensors whose writers are known.

    Args:
        infos: of all that is stored; members of the shares are numbers into it.
        owners: the rank that writes each.
        size: how many ranks there are.
        labels: tensors of different labels don't share a file; those of one label have one owner.
        sharded: which of them are pieces of a larger tensor. Loaders that go by an index file look for
            whole tensors, so a group with pieces gets none.
    """
    layout = plan(infos, labels)
    shares: list[list[Share]] = [[] for _ in range(size)]
    in_pieces = set()
    for segment in layout.segments:
        members = tuple(placement.index for placement in segment.placements)
        shares[owners[members[0]]].append(Share(segment.file, members))
        if any(member in sharded for member in members):
            in_pieces.add(segment.file)
    indexes = {
        name: data
        for name, data in layout.indexes.items()
        if in_pieces.isdisjoint(json.loads(data)["weight_map"].values())
    }
    return Plan(shares=shares, indexes=indexes, tensors=infos, layout=layout)


def layout_of(shares: Iterable[Share], infos: Sequence[TensorInfo], own: Sequence[TensorInfo]) -> Layout:
    """What one rank writes: its shares, then tensors that no other rank has; those are numbered behind."""
    segments = [segment_of(share.file, share.members, infos) for share in shares]
    count, theirs = len(infos), plan(own)
    both = [*infos, *own]
    segments += [
        segment_of(segment.file, [count + placed.index for placed in segment.placements], both)
        for segment in theirs.segments
    ]
    aliases = [replace(alias, index=count + alias.index, base=count + alias.base) for alias in theirs.aliases]
    return Layout(segments=tuple(segments), aliases=tuple(aliases), indexes=theirs.indexes)


def _own_pieces(pieces: Sequence[Sequence[Shard]], loads: list[int]) -> list[tuple[int, int]]:
    """For each distinct piece a rank that holds it, and its number there; the least loaded of several."""
    holders: dict[tuple[Any, ...], list[tuple[int, int]]] = defaultdict(list)
    tensors: dict[str, list[Shard]] = defaultdict(list)
    for rank, held in enumerate(pieces):
        for number, piece in enumerate(held):
            key = (piece.address, piece.at, piece.shape)
            if key not in holders:
                tensors[piece.address].append(piece)
            holders[key].append((rank, number))
    for address, boxes in tensors.items():
        whole = boxes[0].whole
        problem = problem_of_pieces(whole, boxes)
        if problem is not None:
            raise RanksDifferError(
                f"the shards of {address!r} (shape {list(whole)}) that {len(pieces)} ranks hold don't make "
                f"up the tensor: {problem}. Every rank that holds a shard has to take part: give the store "
                "the world of all of them, Store(path, world=Ranks()); give dcp.save the group of all"
            )
    owned = []
    for holding in sorted(holders.values(), key=len):
        rank, number = min(holding, key=lambda holder: (loads[holder[0]], holder[0]))
        loads[rank] += pieces[rank][number].info.bytes
        owned.append((rank, number))
    return sorted(owned)


def problem_of_pieces(whole: Sequence[int], pieces: Sequence[Shard | Chunk]) -> str | None:
    """What is wrong with the pieces of a tensor; a tensor without elements has one that is empty."""
    if not math.prod(whole):
        return None
    return problem_of_tiling(whole, [Box(piece.at, piece.shape) for piece in pieces])


def _split(tensors: Sequence[TensorInfo], loads: list[int]) -> list[int]:
    """A rank for each tensor: the largest first, each to the rank that has least so far.

    The small ones of a group go to one rank: statistics that each rank gathers for itself (a batch norm's) go
    together, and are not to be a mixture.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        groups[tensor.group].append(index)
    owners = [0] * len(tensors)
    for members in groups.values():
        total = sum(tensors[index].bytes for index in members)
        count = min(len(loads), max(1, -(-total // SHARE_BYTES)))
        least = [
            (loads[rank], rank) for rank in heapq.nsmallest(count, range(len(loads)), key=loads.__getitem__)
        ]
        heapq.heapify(least)
        of_small = least[0][1]
        for index in sorted(members, key=lambda index: -tensors[index].bytes):
            if tensors[index].bytes <= SMALL_BYTES:
                owners[index] = of_small
                loads[of_small] += tensors[index].bytes
                continue
            load, rank = least[0]
            owners[index] = rank
            loads[rank] = load + tensors[index].bytes
            heapq.heapreplace(least, (loads[rank], rank))
    return owners


# ------------------------------------------------------------------------------------ differences


def differences(described: Sequence[Sequence[Sequence[Any]]], most: int = 3) -> str | None:
    """In words, how ranks' tensors differ from rank 0's; None if they don't.

    Args:
        described: for each rank, for each tensor: address, dtype, shape, and what else must agree.
        most: so many differences are spelled out for each rank.
    """
    first = {entry[0]: list(entry[1:]) for entry in described[0]}
    lines = []
    for rank, entries in enumerate(described):
        other = {entry[0]: list(entry[1:]) for entry in entries}
        if other == first:
            if list(other) != list(first):
                lines.append(f"  rank {rank}: the same tensors as rank 0 in another order; {_ORDER}")
            continue
        found = [f"{address} is only on rank 0" for address in first if address not in other]
        found += [f"{address} is only on rank {rank}" for address in other if address not in first]
        found += [
            f"{address} is {_said(other[address])} on rank {rank}, {_said(entry)} on rank 0"
            for address, entry in first.items()
            if address in other and other[address] != entry
        ]
        more = f"; and {len(found) - most} more" if len(found) > most else ""
        lines.append(f"  rank {rank}: {'; '.join(found[:most])}{more}")
    return "\n".join(lines[:10]) or None


_ORDER = "fill dicts in one order on all ranks, and never by going through a set"


def _said(entry: Sequence[Any]) -> str:
    dtype, shape, *rest = entry
    return f"{dtype}{list(shape)}" + "".join(f" ({word})" for word in rest if word)
