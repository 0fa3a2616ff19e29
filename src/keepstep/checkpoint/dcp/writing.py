"""`StorageWriter`: what torch.distributed.checkpoint saves becomes a keepstep checkpoint."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.futures import Future

from keepstep.checkpoint.dcp.names import Branch, encoded, plant
from keepstep.checkpoint.place.joined import JoinedWorkspace
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.checkpoint.saving.description import Lineage, describe
from keepstep.checkpoint.saving.layout import tensor_entries
from keepstep.checkpoint.saving.planner import Planner
from keepstep.checkpoint.saving.ranks import Shard, Share, lay_out, layout_of
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.checkpoint.saving.save import Content, info_of, publish, segment_writer
from keepstep.checkpoint.saving.staging import BlockPool
from keepstep.errors import UsageError
from keepstep.files import Files, LocalFiles
from keepstep.tree import Leaf, flatten

__all__ = ["StorageWriter"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Orders:
    """What the coordinator tells a rank.

    Attributes:
        invitation: to the unfinished checkpoint.
        rank: which one this is.
        shares: its files; members are numbers of the rank's own pieces.
        lone: group of tensors that lie at the root of the state dict.
    """

    invitation: str
    rank: int
    shares: Sequence[Share]
    lone: str


class StorageWriter(storage.StorageWriter):
    """Writes one keepstep checkpoint for `dcp.save` or `dcp.async_save`.

    The checkpoint is there once all ranks have written, or not at all. `Checkpoint.open(path)`, `Store` and
    the `keepstep` command read it; `Checkpoint.load` gives the nested state with whole tensors.

    Args:
        path: the directory of this checkpoint, which all ranks see: new, empty, or an earlier keepstep
            checkpoint, which is then replaced. A `checkpoint_id` given to `dcp.save` takes its place.
        step: optimizer steps done.
        epoch: the epoch under way.
        metrics: name -> number or string.
        tags: names for it.
        pinned: whether retention may never drop it.
        memory_budget_bytes: most host memory for copying; at least 16 MiB.
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
        files: Files | None = None,
    ) -> None:
        self._description = describe(step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned)
        self._files: Files = files if files is not None else LocalFiles()
        self._pool = BlockPool(memory_budget_bytes)
        self._final = Path(path).resolve()
        self._workspace: LocalWorkspace | None = None
        self._abandon: weakref.finalize[Any, Any] | None = None
        self._indexes: Mapping[str, bytes] = {}
        self._lone = ""

    @property
    def checkpoint_id(self) -> str:
        """The directory."""
        return str(self._final)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a directory's name, and no address of another kind."""
        return "://" not in os.fspath(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another save."""
        self._discard()
        if checkpoint_id is not None:
            self._final = Path(checkpoint_id).resolve()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Called by DCP on each rank."""
        self._discard()  # of a save that failed on another rank
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "use_collectives is False, so ranks would write without knowing of each other; keepstep's "
                "StorageWriter makes one checkpoint of all of them: leave it True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Called by DCP on each rank."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Called by DCP on the coordinator: makes the unfinished directory and names the files."""
        if not all(plan.usable for plan in plans):
            raise UsageError(
                "enable_plan_caching is True: DCP then withholds plans that keepstep's StorageWriter needs "
                "at each save; use DefaultSavePlanner(enable_plan_caching=False), which is the default"
            )
        paths = [path for plan in plans for path in _paths(plan).values()]
        if reserved := {str(path[0]) for path in paths if re.match(r"objects-\d", str(path[0]))}:
            raise UsageError(
                f"the state dict has the root key {min(reserved)!r}, which names what ranks keep of values "
                "that are no tensors; rename it"
            )
        lone = "state"
        while any(len(path) > 1 and str(path[0]) == lone for path in paths):
            lone += "_"
        _refuse_twins(plans, lone)
        held = [[piece for _, piece in _pieces(plan, lone)] for plan in plans]
        infos = [piece.info for pieces in held for piece in pieces]
        owners = [rank for rank, pieces in enumerate(held) for _ in pieces]
        sharded = {n for n, p in enumerate(p for pieces in held for p in pieces) if p.shape != p.whole}
        laid_out = lay_out(infos, owners, len(plans), labels=owners, sharded=sharded)
        workspace = self._open()
        self._indexes, self._lone = laid_out.indexes, lone
        begins = [owners.index(rank) if rank in set(owners) else 0 for rank in range(len(plans))]
        return [
            dataclasses.replace(
                plan,
                storage_data=_Orders(
                    invitation=workspace.invitation(),
                    rank=rank,
                    shares=[
                        Share(share.file, tuple(member - begins[rank] for member in share.members))
                        for share in laid_out.shares[rank]
                    ],
                    lone=lone,
                ),
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[storage.WriteResult]]:
        """Called by DCP on each rank: writes the rank's share; durable on return."""
        try:
            report, size = self._write_share(plan, planner)
        except BaseException:
            self._discard()
            raise
        future: Future[list[storage.WriteResult]] = Future()
        future.set_result([storage.WriteResult(MetadataIndex("keepstep"), size, report.dump())])
        return future

    def finish(self, metadata: Metadata, results: list[list[storage.WriteResult]]) -> None:
        """Called by DCP on the coordinator, once all ranks have written: commits."""
        workspace = self._workspace
        assert workspace is not None, "finish() without prepare_global_plan()"
        try:
            with workspace.explained():
                self._commit(workspace, metadata, results)
        except BaseException:
            self._discard()
            raise
        self._workspace = None
        if self._abandon is not None:
            self._abandon.detach()

    # ------------------------------------------------------------------------------------- inside

    def _open(self) -> LocalWorkspace:
        workspace = LocalWorkspace(self._files, self._final)
        with workspace.explained():
            workspace.check()
            workspace.open()
        self._workspace = workspace
        # If another rank fails, DCP calls nothing here any more.
        self._abandon = weakref.finalize(self, workspace.discard)
        return workspace

    def _discard(self) -> None:
        if self._workspace is not None:
            self._workspace.discard()
            self._workspace = None

    def _write_share(self, plan: SavePlan, planner: SavePlanner) -> tuple[Report, int]:
        orders: _Orders = plan.storage_data
        shards, leaves = [], []
        for item, piece in _pieces(plan, orders.lone):
            info = piece.info
            tensor = _rows(planner, item, piece)
            shards.append(piece)
            leaves.append(Leaf(address=info.address, group=info.group, name=info.name, tensor=tensor))
        objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        group = f"objects-{orders.rank:05d}"
        flat = flatten({group: [_object(planner, item) for item in objects]})
        nodes = {item.index.fqn: node for item, node in zip(objects, flat.tree[group], strict=True)}
        infos, own = [piece.info for piece in shards], list(map(info_of, flat.leaves))
        layout = layout_of(orders.shares, infos, own)
        joined = JoinedWorkspace(self._files)
        joined.accept(orders.invitation)
        with joined.explained():
            joined.open()
            writer, _, _ = segment_writer(joined, layout, [*leaves, *flat.leaves], self._pool, Planner())
            writer.write()
        entries = tensor_entries([*infos, *own], layout, writer.digests)
        return Report.of(entries, writer.file_entries(), shards, nodes), layout.bytes

    def _commit(
        self, workspace: LocalWorkspace, metadata: Metadata, results: list[list[storage.WriteResult]]
    ) -> None:
        reports = [Report.load(result.storage_data) for of_rank in results for result in of_rank]
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        nodes = {fqn: node for report in reports for fqn, node in report.tree.items()}
        files, tensors = merge(reports)
        root = Branch()
        for fqn in metadata.state_dict_metadata:
            path = paths.get(fqn, (fqn,))
            plant(root, path, nodes[fqn] if fqn in nodes else {"$tensor": _address(path, self._lone)})
        content = Content(
            tree=encoded(root), tensors=tensors, files=files, small=self._indexes, world_size=len(results)
        )
        publish(workspace, content, self._description, Lineage(run=secrets.token_hex(8)))


def _paths(plan: SavePlan) -> dict[str, tuple[Any, ...]]:
    """Where in the nested state dict each item of a plan lies; the planner may not have told."""
    told = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
    return {item.index.fqn: tuple(told.get(item.index.fqn, (item.index.fqn,))) for item in plan.items}


def _refuse_twins(plans: Sequence[SavePlan], lone: str) -> None:
    """Two tensors under one address would be one: {"a": {"b/c": x}, "a/b": {"c": y}}."""
    names: dict[str, str] = {}
    for plan in plans:
        paths = _paths(plan)
        for item in plan.items:
            address = _address(paths[item.index.fqn], lone)
            other = names.setdefault(address, item.index.fqn)
            if other != item.index.fqn:
                raise UsageError(
                    f"{other!r} and {item.index.fqn!r} would both be stored as {address!r}; rename one"
                )


def _group_and_name(path: Sequence[Any], lone: str) -> tuple[str, str]:
    """A tensor's file, and its name there: what lies at the root of the state dict shares one."""
    if len(path) == 1:
        return lone, str(path[0])
    return str(path[0]), ".".join(map(str, path[1:]))


def _address(path: Sequence[Any], lone: str) -> str:
    return "/".join(_group_and_name(path, lone))


def _pieces(plan: SavePlan, lone: str) -> Iterator[tuple[WriteItem, Shard]]:
    """What a rank writes of tensors, in an order that coordinator and rank agree on."""
    paths = _paths(plan)
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
            continue
        path, data = paths[item.index.fqn], item.tensor_data
        group, name = _group_and_name(path, lone)
        shard = Shard(
            address=_address(path, lone),
            group=group,
            name=name,
            dtype=str(data.properties.dtype).removeprefix("torch."),
            itemsize=data.properties.dtype.itemsize,
            whole=tuple(data.size),
            at=tuple(data.chunk.offsets),
            shape=tuple(data.chunk.sizes),
        )
        for piece in shard.pieces():
            yield item, piece


def _rows(planner: SavePlanner, item: WriteItem, piece: Shard) -> torch.Tensor:
    """The piece of a rank's tensor: pieces differ along the first dimension only."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor), "planners give tensors for items of tensors"
    if not math.prod(piece.shape):
        return tensor.detach().new_empty(piece.shape)
    if not piece.shape or item.tensor_data is None:
        return tensor.detach()
    return tensor.detach().narrow(0, piece.at[0] - item.tensor_data.chunk.offsets[0], piece.shape[0])


def _object(planner: SavePlanner, item: WriteItem) -> Any:
    """A value that is no tensor, as it is: `resolve_data` would give its pickled bytes."""
    default = DefaultSavePlanner
    if not (
        isinstance(planner, default)
        and type(planner).resolve_data is default.resolve_data
        and type(planner).transform_object is default.transform_object
    ):
        raise UsageError(
            f"{item.index.fqn!r} is no tensor, and {type(planner).__name__} gives such values as bytes of "
            "its own making only. keepstep writes them as typed JSON, never as pickled bytes: use "
            "DefaultSavePlanner (a subclass may override all but resolve_data and transform_object), or "
            "leave values that are no tensors out of the state dict"
        )
    return planner.lookup_object(item.index)
