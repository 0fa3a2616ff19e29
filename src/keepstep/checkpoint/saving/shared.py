"""One save by many ranks: each writes its share into one directory, rank 0 commits.

All ranks go through the same steps of one meeting:

1. each tells what it holds (as digests); rank 0 makes the unfinished directory and names it;
2. if anything differs from the last save: shards are told in full, rank 0 plans, each is told its files;
3. each copies, writes and fsyncs its files;
4. all tell rank 0 what they wrote; it writes state.json and the manifest, and commits;
5. rank 0 tells, and all return.

Whoever raises on the way tells the others, who raise at once; who dies or hangs is named by the time-out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from keepstep.checkpoint.format.manifest import Manifest, digest_of
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import source_of
from keepstep.checkpoint.place.backend import GuestWorkspace, HostWorkspace, Workspace
from keepstep.checkpoint.saving.committing import Content, publish
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.checkpoint.saving.layout import TensorInfo, tensor_entries
from keepstep.checkpoint.saving.rank_planner import RankPlanner
from keepstep.checkpoint.saving.ranks import Shard, Share, differences, layout_of
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.checkpoint.saving.save import Save, flatten_both, info_of
from keepstep.checkpoint.saving.staging import BlockPool
from keepstep.errors import RankError, RanksDifferError
from keepstep.meetings import Meeting
from keepstep.tree import Flat, Leaf
from keepstep.world import World

__all__ = ["SharedSave"]

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class SharedSave(Save):
    """A `Save` that all ranks do together.

    Args:
        world: the ranks.
        place: what is saved to; the same on all ranks, or none saves.
        topic: what the meeting is about; the same on all ranks.
        reserve: rank 0's workspace; called on rank 0 only.
        guest: the workspace of any other rank.
        ranks: plans the saves of the same store.
        state: what every rank holds, and shards.
        own: what is this rank's own; None if there is nothing.
        description: what the user says of it; step and epoch must agree.
        lineage: rank 0's counts.
        pool: blocks to copy into.
    """

    _host: HostWorkspace  # of rank 0
    _guest: GuestWorkspace  # of the others

    def __init__(
        self,
        *,
        world: World,
        place: str,
        topic: str,
        reserve: Callable[[], HostWorkspace],
        guest: Callable[[], GuestWorkspace],
        ranks: RankPlanner,
        state: Any,
        own: Any,
        description: Description,
        lineage: Lineage,
        pool: BlockPool,
    ) -> None:
        self._world = world
        self._place = place
        self._ranks = ranks
        self._meeting_over = contextlib.ExitStack()
        self._meeting: Meeting = self._meeting_over.enter_context(world.meeting(topic))
        self._writer_made = False
        self._told: RankError | None = None
        self._key: tuple[Any, ...] = ()
        try:
            workspace: Workspace
            if world.rank:
                workspace = self._guest = guest()
            else:
                workspace = self._host = reserve()
            super().__init__(
                workspace=workspace,
                planner=ranks.share,
                state=state,
                description=description,
                lineage=lineage,
                pool=pool,
                own=own,
            )
            self._writer_made = True
        except BaseException:
            self.discard()
            raise

    @property
    def bytes_of_all(self) -> int:
        """Size of the segments of all ranks, as far as this one knows: each has as much of its own."""
        plan, files = self._ranks.plan, len(self._ranks.files)
        if plan is None:
            return self.bytes
        own = sum(segment.bytes for segment in self._layout.segments[files:])
        return plan.bytes + own * self._world.size

    # --------------------------------------------------------------------------------------- plan

    def _lay_out(self, state: Any, own: Any) -> None:
        flat, self._own = flatten_both(state, own, self._world.rank)
        replicated = [leaf for leaf in flat.leaves if leaf.shard is None]
        cut = [pair for leaf in flat.leaves if leaf.shard is not None for pair in _cut(leaf, leaf.shard)]
        self._pieces = [piece for piece, _ in cut]
        self._order = [leaf.address for leaf in flat.leaves]
        held = [info_of(leaf) for leaf in replicated]
        shares = self._agree(flat.leaves, held)
        own_infos = [info_of(leaf) for leaf in self._own.leaves]
        shared = [*held, *(piece.info for piece in self._pieces)]
        self._infos = [*shared, *own_infos]
        self._flat = Flat(tree=flat.tree, leaves=[*replicated, *(leaf for _, leaf in cut), *self._own.leaves])
        self._layout = layout_of(shares, shared, own_infos)
        if (plan := self._ranks.plan) is not None:  # rank 0
            self._layout = replace(
                self._layout,
                aliases=(*plan.aliases, *self._layout.aliases),
                indexes={**plan.indexes, **self._layout.indexes},
            )
        self._planner.follow(self._infos, self._layout)

    def _agree(self, leaves: Sequence[Leaf], held: Sequence[TensorInfo]) -> Sequence[Share]:
        """Compare with the other ranks, find the unfinished directory, and which files are this rank's."""
        described = json.dumps([_described(leaf) for leaf in leaves]).encode()
        pieces = json.dumps(self._pieces).encode()
        said = [self._description.step, self._description.epoch, self._place]
        now = [digest_of(described), digest_of(pieces), said, self._ranks.id, self._planner.remembers]
        told = json.dumps(now).encode()
        everyones = [json.loads(data) for data in self._meeting.collect(told)]
        if self._world.rank == 0:
            key = tuple(tuple(one[:2]) for one in everyones)
            mode = self._mode(everyones, key, held)
            links = all(one[4] for one in everyones)
            self._meeting.broadcast(json.dumps([self._open(everyones), mode, links]).encode())
        else:
            invitation, mode, links = json.loads(self._meeting.broadcast(b""))
            self._guest.accept(invitation)
            key = ()
        if not links:  # damage was found, perhaps by another rank
            self._planner.forget()
        if mode == "differ":
            said_by_all = [json.loads(data) for data in self._meeting.collect(described)]
            if self._world.rank == 0:
                raise RanksDifferError(f"{_DIFFER}\n{differences(said_by_all)}")
        self._key = key
        if mode == "as before":
            return self._ranks.files
        self._plan(held, [json.loads(data) for data in self._meeting.collect(pieces)])
        return self._ranks.files

    def _mode(self, everyones: Sequence[Any], key: tuple[Any, ...], held: Sequence[TensorInfo]) -> str:
        if any(one[0] != everyones[0][0] for one in everyones):
            return "differ"
        return "as before" if self._ranks.fits(key, [one[3] for one in everyones], held) else "plan"

    def _open(self, everyones: Sequence[Any]) -> str:
        """Make the unfinished checkpoint; what the others have to know of it."""
        for rank, one in enumerate(everyones):
            (step, epoch, place), (first_step, first_epoch, first_place) = one[2], everyones[0][2]
            if place != first_place:
                raise RanksDifferError(
                    f"rank {rank} saves to {place}, rank 0 to {first_place}: ranks must save together, and "
                    "if several threads do, in one order; nothing was written"
                )
            if (step, epoch) != (first_step, first_epoch):
                raise RanksDifferError(
                    f"rank {rank} saves step {step} of epoch {epoch}, rank 0 step {first_step} of epoch "
                    f"{first_epoch}: ranks must save together; nothing was written"
                )
        with self._host.explained():
            self._host.check()
            self._host.open()
            return self._host.invitation()

    def _plan(self, held: Sequence[TensorInfo], pieces: Sequence[Sequence[Any]]) -> None:
        answers: list[bytes] = []
        if self._world.rank == 0:
            of_ranks = [[_shard_of(piece) for piece in of_rank] for of_rank in pieces]
            answers = [json.dumps(answer).encode() for answer in self._ranks.decide(held, of_ranks)]
        plan_id, mine = json.loads(self._meeting.scatter(answers))
        self._ranks.take(plan_id, [Share(file, tuple(members)) for file, members in mine])

    # ------------------------------------------------------------------------------------- commit

    def _commit(self) -> Manifest:
        files = self._writer.file_entries()
        entries = tensor_entries(self._infos, self._layout, self._writer.digests)
        resting = self._planner.resting(entries)
        report = Report.of(entries, files, self._pieces, self._own.tree, resting)
        reports = self._meeting.collect(report.dump())
        if self._world.rank == 0:
            manifest = self._publish([Report.load(data) for data in reports])
        self._meeting.broadcast(b"committed")
        if self._world.rank:
            self._guest.leave()
            manifest = read_manifest(self.workspace.final)
        self._planner.remember(source_of(self.workspace.final).name, files, entries)
        try:
            self._meeting.collect(b"")  # rank 0 may serve the store: it stays until all have heard
        except RankError as error:
            log.warning("committed, but not all ranks said that they heard of it: %s", error)
        self._meeting_over.close()
        return manifest

    def _publish(self, reports: Sequence[Report]) -> Manifest:
        files, tensors = merge(reports, self._order)
        if unwritten := [address for address in self._order if address not in tensors]:
            raise RanksDifferError(_UNWRITTEN.format(count=len(unwritten), some=", ".join(unwritten[:3])))
        self._host.take_over(files)
        own = [report.tree for report in reports]
        content = Content(
            tree=self._flat.tree,
            tensors=tensors,
            files=files,
            small=self._layout.indexes,
            ranks=own if any(tree is not None for tree in own) else None,
            world_size=self._world.size,
        )
        manifest = publish(self.workspace, content, self._description, self._lineage)
        resting = {file: flags for report in reports for file, flags in report.resting.items()}
        self._ranks.learn(self._key, resting)
        return manifest

    # ------------------------------------------------------------------------------------ failure

    def _discarding(self, work: Callable[[], _T]) -> _T:
        try:
            return super()._discarding(work)
        except RankError:
            raise
        except BaseException as error:
            told = self._told
            if told is not None and isinstance(error, Exception):
                raise told from error  # what another rank met is why this one could not go on
            raise

    def discard(self) -> None:
        """Stop, remove what was written, and let the other ranks know."""
        error = sys.exc_info()
        try:
            self._meeting.check()
        except RankError as news:
            self._told = news
        self._meeting_over.__exit__(*error)
        if self._writer_made:
            self._writer.abort()
        if hasattr(self, "workspace"):
            self.workspace.discard()


_UNWRITTEN = (
    "{count} tensors were written by no rank ({some}), so no checkpoint was made: the ranks don't go by one "
    "plan. Make the store on all ranks at the same point of the program"
)
_DIFFER = "the ranks hold different states, so no checkpoint can be made of them; nothing was written:"


def _described(leaf: Leaf) -> list[Any]:
    dtype = str(leaf.tensor.dtype).removeprefix("torch.")
    if leaf.shard is None:
        return [leaf.address, dtype, list(leaf.tensor.shape), None]
    return [leaf.address, dtype, list(leaf.shard[1]), "sharded"]


def _cut(leaf: Leaf, shard: tuple[tuple[int, ...], tuple[int, ...]]) -> list[tuple[Shard, Leaf]]:
    """The pieces of a shard, and the tensors that hold them."""
    at, whole = shard
    box = Shard(
        address=leaf.address,
        group=leaf.group,
        name=leaf.name,
        dtype=str(leaf.tensor.dtype).removeprefix("torch."),
        itemsize=leaf.tensor.itemsize,
        whole=whole,
        at=at,
        shape=tuple(leaf.tensor.shape),
        frozen=leaf.frozen,
    )
    found = []
    for piece in box.pieces():
        tensor = leaf.tensor
        if not math.prod(piece.shape):
            tensor = tensor.new_empty(piece.shape)
        elif piece.shape != tuple(tensor.shape):
            tensor = tensor.narrow(0, piece.at[0] - at[0], piece.shape[0])
        info = piece.info
        found.append((piece, leaf._replace(address=info.address, name=info.name, tensor=tensor)))
    return found


def _shard_of(node: Sequence[Any]) -> Shard:
    address, group, name, dtype, itemsize, whole, at, shape, frozen = node
    return Shard(address, group, name, dtype, itemsize, tuple(whole), tuple(at), tuple(shape), frozen)
