"""`StorageWriter`: what torch.distributed.checkpoint saves becomes a keepstep checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import secrets
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.futures import Future

from keepstep.checkpoint.dcp.coordinated import CoordinatedSave
from keepstep.checkpoint.dcp.memory import Memory, give_back, take
from keepstep.checkpoint.dcp.names import Branch, encoded, plant
from keepstep.checkpoint.dcp.pieces import (
    address_at,
    paths_of,
    pieces_of,
    refuse_twins,
    rows_of,
    value_of,
)
from keepstep.checkpoint.dcp.spots import Spot, is_place
from keepstep.checkpoint.format.source import source_of
from keepstep.checkpoint.saving.committing import Content, publish
from keepstep.checkpoint.saving.description import Lineage, describe
from keepstep.checkpoint.saving.layout import Layout, tensor_entries
from keepstep.checkpoint.saving.planner import Planner
from keepstep.checkpoint.saving.ranks import Share, layout_of
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.checkpoint.saving.save import info_of, segment_writer
from keepstep.checkpoint.saving.staging import BlockPool
from keepstep.checkpoint.saving.writer import SegmentWriter
from keepstep.errors import UsageError
from keepstep.files import Files, LocalFiles
from keepstep.tree import Leaf, flatten

__all__ = ["StorageWriter"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Orders:
    """What the coordinator tells a rank.

    Attributes:
        place: where the checkpoint will lie: in what, and its name there.
        invitation: to the unfinished checkpoint.
        last: the save that was committed last in the same directory; empty if that is not known.
        rank: which one this is.
        size: how many ranks save.
        shares: its files; members are numbers of the rank's own pieces.
        lone: group of tensors that lie at the root of the state dict.
    """

    place: tuple[str, str]
    invitation: str
    last: str
    rank: int
    size: int
    shares: Sequence[Share]
    lone: str


class StorageWriter(storage.StorageWriter):
    """Writes one keepstep checkpoint for `dcp.save` or `dcp.async_save`.

    The checkpoint is there once all ranks have written, or not at all. `Checkpoint.open(path)`, `Store` and
    the `keepstep` command read it; `Checkpoint.load` gives the nested state with whole tensors.

    In a directory, files in which nothing has changed are linked to the last checkpoint that this process
    saved, or loaded whole, beside this one, by whichever writer. In a bucket all is uploaded each time.

    Args:
        path: the directory of this checkpoint, which all ranks see: new, empty, or an earlier keepstep
            checkpoint, which is then replaced; or a new address, as "s3://bucket/run/step_100". A
            `checkpoint_id` given to `dcp.save` takes its place.
        step: optimizer steps done.
        epoch: the epoch under way.
        metrics: name -> number or string.
        tags: names for it.
        pinned: whether retention may never drop it.
        memory_budget_bytes: most host memory for copying; at least 16 MiB.
        storage_options: of a bucket, see `Store`.
        files: how the disk is changed; tests pass one that fails on purpose.

    Raises:
        UsageError: from `dcp.save`: the planner pickles values that are no tensors, `use_collectives=False`,
            or `enable_plan_caching=True`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        step: int | None = None,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        pinned: bool = False,
        memory_budget_bytes: int = 64 << 20,
        storage_options: Mapping[str, Any] | None = None,
        files: Files | None = None,
    ) -> None:
        self._description = describe(step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned)
        self._files: Files = files if files is not None else LocalFiles()
        BlockPool(memory_budget_bytes)  # says now what is too little
        self._memory_budget_bytes = memory_budget_bytes
        self._options = storage_options
        self._spot = Spot.of(path, storage_options)
        self._save: CoordinatedSave | None = None
        self._abandon: weakref.finalize[Any, Any] | None = None
        self._lone = ""

    @functools.cached_property
    def _pool(self) -> BlockPool:
        """Made by the process that writes: async_save may send the writer to one of its own."""
        return BlockPool(self._memory_budget_bytes)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs that is to save, without what belongs to this one."""
        kept = {name: value for name, value in self.__dict__.items() if name != "_pool"}
        return {**kept, "_save": None, "_abandon": None}

    @property
    def checkpoint_id(self) -> str:
        """The directory, or the address."""
        return str(self._spot)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint can lie there."""
        return is_place(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another save."""
        self._make_way()
        if checkpoint_id is not None:
            self._spot = Spot.of(checkpoint_id, self._options)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by DCP on each rank."""
        self._make_way()
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives is False, so ranks would write without knowing of each other; keepstep's "
                "StorageWriter makes one checkpoint of all of them: leave it True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Called by DCP on each rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Called by DCP on the coordinator: makes the unfinished checkpoint and names the files."""
        if not all(plan.usable for plan in plans):
            raise UsageError(
                "enable_plan_caching is True: DCP then withholds plans that keepstep's StorageWriter needs "
                "at each save; use DefaultSavePlanner(enable_plan_caching=False), which is the default"
            )
        paths = [path for plan in plans for path in paths_of(plan).values()]
        if reserved := {str(path[0]) for path in paths if re.match(r"objects-\d", str(path[0]))}:
            raise UsageError(
                f"the state dict has the root key {min(reserved)!r}, which names what ranks keep of values "
                "that are no tensors; rename it"
            )
        lone = "state"
        while any(len(path) > 1 and str(path[0]) == lone for path in paths):
            lone += "_"
        refuse_twins(plans, lone)
        held = [[piece for _, piece in pieces_of(plan, lone)] for plan in plans]
        self._save = save = CoordinatedSave(self._spot, self._files, held)
        # If another rank fails, DCP calls nothing here any more.
        self._abandon = weakref.finalize(self, save.discard)
        self._lone = lone
        return [
            dataclasses.replace(
                plan,
                storage_data=_Orders(
                    place=(self._spot.parent, self._spot.name),
                    invitation=save.invitation,
                    last=save.memory.last,
                    rank=rank,
                    size=len(plans),
                    shares=save.plan.shares[rank],
                    lone=lone,
                ),
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[storage.WriteResult]]:
        """Called by DCP on each rank: writes the rank's share; durable on return."""
        orders: _Orders = plan.storage_data
        try:
            if self._save is not None:  # of the coordinator
                with self._save.call():
                    report, size = self._write(plan, planner, self._save.memory)
            else:
                spot = Spot(*orders.place)
                memory = take(spot, orders.size)
                try:
                    report, size = self._write(plan, planner, memory)
                finally:
                    give_back(spot, memory)
        except BaseException:
            self._discard()
            raise
        future: Future[list[storage.WriteResult]] = Future()
        future.set_result([storage.WriteResult(MetadataIndex("keepstep"), size, report.dump())])
        return future

    def finish(self, metadata: Metadata, results: list[list[storage.WriteResult]]) -> None:
        """Called by DCP on the coordinator, once all ranks have written: commits."""
        save = self._save
        assert save is not None, "finish() without prepare_global_plan()"
        save.check_thread()
        try:
            with save.call(), save.workspace.explained():
                resting = self._commit(save, metadata, results)
        except BaseException:
            self._discard()
            raise
        save.committed(resting)
        self._let_go()

    # ------------------------------------------------------------------------------------- inside

    def _make_way(self) -> None:
        """Discard a save that failed on another rank.

        Raises:
            UsageError: it did not fail, and another thread is at it.
        """
        if self._save is not None:
            self._save.make_way(of_same_writer=True)
        self._discard()

    def _discard(self) -> None:
        if self._save is not None:
            self._save.discard()
            self._let_go()

    def _let_go(self) -> None:
        self._save = None
        if self._abandon is not None:
            self._abandon.detach()
            self._abandon = None

    def _write(self, plan: SavePlan, planner: SavePlanner, memory: Memory) -> tuple[Report, int]:
        """Write this rank's share; what it was, and its bytes."""
        orders: _Orders = plan.storage_data
        shards, leaves = [], []
        for item, piece in pieces_of(plan, orders.lone):
            info = piece.info
            tensor = rows_of(planner, item, piece)
            shards.append(piece)
            leaves.append(Leaf(address=info.address, group=info.group, name=info.name, tensor=tensor))
        objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        group = f"objects-{orders.rank:05d}"
        flat = flatten({group: [value_of(planner, item) for item in objects]})
        nodes = {item.index.fqn: node for item, node in zip(objects, flat.tree[group], strict=True)}
        infos, own = [piece.info for piece in shards], list(map(info_of, flat.leaves))
        layout = layout_of(orders.shares, infos, own)
        memory.settle(orders.last)
        memory.ranks.share.follow([*infos, *own], layout)
        writer, name = self._written(orders, layout, [*leaves, *flat.leaves], memory.ranks.share)
        entries, files = tensor_entries([*infos, *own], layout, writer.digests), writer.file_entries()
        memory.wrote(orders.invitation, name, files, entries)
        return Report.of(entries, files, shards, nodes, memory.ranks.share.resting(entries)), layout.bytes

    def _written(
        self, orders: _Orders, layout: Layout, leaves: Sequence[Leaf], share: Planner
    ) -> tuple[SegmentWriter, str]:
        """What has written these tensors into the unfinished checkpoint, and the name that this will have."""
        guest = Spot(*orders.place, self._options).guest(self._files)
        guest.accept(orders.invitation)
        with guest.explained():
            guest.open()
            writer, _, _ = segment_writer(guest, layout, leaves, self._pool, share)
            try:
                writer.write()
            except BaseException:
                guest.discard()
                raise
        guest.leave()
        return writer, source_of(guest.final).name

    def _commit(
        self, save: CoordinatedSave, metadata: Metadata, results: list[list[storage.WriteResult]]
    ) -> dict[str, str]:
        """Publish it; what the ranks found to be as before."""
        reports = [Report.load(result.storage_data) for of_rank in results for result in of_rank]
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        nodes = {fqn: node for report in reports for fqn, node in report.tree.items()}
        files, tensors = merge(reports)
        save.workspace.take_over(files)
        root = Branch()
        for fqn in metadata.state_dict_metadata:
            path = paths.get(fqn, (fqn,))
            plant(root, path, nodes[fqn] if fqn in nodes else {"$tensor": address_at(path, self._lone)})
        content = Content(
            tree=encoded(root),
            tensors=tensors,
            files=files,
            small=save.plan.indexes,
            world_size=len(results),
        )
        publish(save.workspace, content, self._description, Lineage(run=secrets.token_hex(8)))
        return {file: flags for report in reports for file, flags in report.resting.items()}
