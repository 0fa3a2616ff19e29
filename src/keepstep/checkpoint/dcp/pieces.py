"""What a rank is to save, by DCP's plan: pieces of tensors, and values that are none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from keepstep.checkpoint.saving.ranks import Shard
from keepstep.errors import UsageError

__all__ = ["address_at", "paths_of", "pieces_of", "refuse_twins", "rows_of", "value_of"]


def paths_of(plan: SavePlan) -> dict[str, tuple[Any, ...]]:
    """Where in the nested state dict each item of a plan lies; the planner may not have told."""
    told = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
    return {item.index.fqn: tuple(told.get(item.index.fqn, (item.index.fqn,))) for item in plan.items}


def refuse_twins(plans: Sequence[SavePlan], lone: str) -> None:
    """Two tensors under one address would be one: {"a": {"b/c": x}, "a/b": {"c": y}}."""
    names: dict[str, str] = {}
    for plan in plans:
        paths = paths_of(plan)
        for item in plan.items:
            address = address_at(paths[item.index.fqn], lone)
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


def address_at(path: Sequence[Any], lone: str) -> str:
    """What a tensor is called in the index of the checkpoint."""
    return "/".join(_group_and_name(path, lone))


def pieces_of(plan: SavePlan, lone: str) -> Iterator[tuple[WriteItem, Shard]]:
    """What a rank writes of tensors, in an order that coordinator and rank agree on."""
    paths = paths_of(plan)
    for item in plan.items:
        if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
            continue
        path, data = paths[item.index.fqn], item.tensor_data
        group, name = _group_and_name(path, lone)
        shard = Shard(
            address=address_at(path, lone),
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


def rows_of(planner: SavePlanner, item: WriteItem, piece: Shard) -> torch.Tensor:
    """The piece of a rank's tensor: pieces differ along the first dimension only."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor), "planners give tensors for items of tensors"
    if not math.prod(piece.shape):
        return tensor.detach().new_empty(piece.shape)
    if not piece.shape or item.tensor_data is None:
        return tensor.detach()
    return tensor.detach().narrow(0, piece.at[0] - item.tensor_data.chunk.offsets[0], piece.shape[0])


def value_of(planner: SavePlanner, item: WriteItem) -> Any:
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
