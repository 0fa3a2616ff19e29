"""What ranks do together with tensors and objects. Names are Accelerate's.

The functions that scripts call take the ranks from `current_world()`; those with a `world` are for the
Accelerator.
"""

from __future__ import annotations

import io
import json
import os
from typing import Any, TypeVar

import torch

from keepstep.errors import CollectiveMismatchError, UsageError
from keepstep.models.objects import save_object
from keepstep.train.ranks.objects import from_bytes, to_bytes
from keepstep.train.ranks.process import current_world
from keepstep.world import Reduction, World
from keepstep.world.nested import replaced, tensors_of

__all__ = [
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "gather_objects",
    "pad_across_processes",
    "pad_across_ranks",
    "reduce",
    "reduce_over_ranks",
    "save",
    "wait_for_everyone",
]

T = TypeVar("T")


def gather(tensor: T) -> T:
    """See `Accelerator.gather`."""
    return current_world().gather(tensor)


def reduce(tensor: T, reduction: Reduction = "mean", scale: float = 1.0) -> T:
    """See `Accelerator.reduce`; here the default is the mean."""
    return reduce_over_ranks(current_world(), tensor, reduction, scale)


def broadcast(tensor: T, from_process: int = 0) -> T:
    """Write one rank's values into the tensors of all ranks.

    Args:
        tensor: a tensor, or a tree of them, of the same shapes and dtypes on every rank; written to.
        from_process: the rank whose values they are.

    Returns:
        `tensor`.

    Raises:
        CollectiveMismatchError: ranks gave other shapes or dtypes, or called something else.
        NotTensorError: a leaf is no tensor.
    """
    return current_world().broadcast_tensors(tensor, from_process)


def gather_object(object: Any) -> Any:  # noqa: A002 (Accelerate's name)
    """Put the lists of all ranks together, in the order of ranks, on every rank.

    Args:
        object: a list or tuple of plain data and tensors, in any nesting; it may differ in length between
            ranks. Classes of your own need `keepstep.register_codec`.

    Returns:
        A list of all items; tensors in it are on the CPU. With one process, `object` itself.

    Raises:
        UsageError: it is no list.
        UnsupportedTypeError: an item is of a type that is not sent; names its place.
        RankFailedError: one of these happened on another rank.
    """
    return gather_objects(current_world(), object)


def broadcast_object_list(object_list: list[Any], from_process: int = 0) -> list[Any]:
    """Replace the items of a list by those of one rank's list.

    Args:
        object_list: plain data and tensors, in any nesting; written to.
        from_process: the rank whose items they are.

    Returns:
        `object_list`.

    Raises:
        UsageError: there is no such rank.
        UnsupportedTypeError: an item is of a type that is not sent; names its place.
    """
    world = current_world()
    if world.size == 1:
        return object_list

    def make() -> bytes:
        if not 0 <= from_process < world.size:
            raise UsageError(f"from_process is {from_process!r}; allowed: 0 to {world.size - 1}")
        return to_bytes(list(object_list)) if world.rank == from_process else b""

    told = world.exchange_bytes(make, f"broadcast_object_list from process {from_process}")
    object_list[:] = from_bytes(told[from_process])
    return object_list


def pad_across_processes(tensor: T, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> T:
    """See `Accelerator.pad_across_processes`."""
    return pad_across_ranks(current_world(), tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)


def save(
    obj: Any,
    f: str | os.PathLike[str] | io.IOBase,
    save_on_each_node: bool = False,
    safe_serialization: bool = False,
) -> None:
    """Write a value to a file on the main process; see `Accelerator.save`.

    Args:
        obj: a state dict, or anything that a checkpoint may hold.
        f: a path, or a file opened for writing bytes.
        save_on_each_node: the first process of each machine writes one.
        safe_serialization: True insists on a state dict of tensors alone.
    """
    world = current_world()
    if (world.local_rank if save_on_each_node else world.rank) == 0:
        save_object(obj, f, safe_serialization)


def wait_for_everyone() -> None:
    """Return once every rank has called this."""
    current_world().barrier()


# ------------------------------------------------------------------------------------- over a world


def reduce_over_ranks(world: World, tree: T, reduction: Reduction, scale: float) -> T:
    """Reduce; refuse the scale that only XLA devices know."""
    if scale != 1.0:
        raise UsageError(
            f"scale is {scale!r}; it is for XLA devices, on which keepstep does not run (elsewhere "
            "Accelerate ignores it). Multiply what reduce() returns"
        )
    return world.reduce(tree, reduction)


def gather_objects(world: World, objects: Any) -> Any:
    """The ranks' lists as one; see `gather_object`."""
    if world.size == 1:
        return objects

    def make() -> bytes:
        if not isinstance(objects, list | tuple):
            raise UsageError(
                f"gather_object: got {objects!r:.60} of type {type(objects).__name__}; expected a list, "
                "whose items are put after those of the other ranks. Wrap a single object: [object]"
            )
        return to_bytes(list(objects))

    return [item for told in world.exchange_bytes(make, "gather_object") for item in from_bytes(told)]


def pad_across_ranks(world: World, tree: T, *, dim: int, pad_index: float, pad_first: bool) -> T:
    """Pad each tensor to the largest size that a rank has; see `Accelerator.pad_across_processes`."""
    name = "pad_across_processes"

    def make() -> bytes:
        return json.dumps([list(tensor.shape) for _, tensor in tensors_of(tree, name)]).encode()

    shapes_by_rank = [json.loads(told) for told in world.exchange_bytes(make, name)]
    dimensions = [[len(shape) for shape in shapes] for shapes in shapes_by_rank]
    if any(other != dimensions[0] for other in dimensions):
        raise CollectiveMismatchError(
            f"{name}: ranks gave different numbers of tensors, or of dimensions: {_by_rank(shapes_by_rank)}. "
            "Give it tensors that differ in the size of one dimension only",
            calls=[f"{name}({shapes})" for shapes in shapes_by_rank],
        )
    padded = []
    for index, (_, tensor) in enumerate(tensors_of(tree, name)):
        if -tensor.dim() <= dim < tensor.dim():
            most = max(shapes[index][dim] for shapes in shapes_by_rank)
            tensor = _padded(tensor, dim % tensor.dim(), most, pad_index, pad_first)
        padded.append(tensor)
    whole: T = replaced(tree, iter(padded))
    return whole


def _padded(tensor: torch.Tensor, dim: int, size: int, value: float, first: bool) -> torch.Tensor:
    present = tensor.shape[dim]
    if present == size:
        return tensor
    padded = tensor.new_full((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), value)
    padded.narrow(dim, size - present if first else 0, present).copy_(tensor)
    return padded


def _by_rank(shapes: list[Any]) -> str:
    return "; ".join(f"rank {rank}: {[tuple(shape) for shape in told]}" for rank, told in enumerate(shapes))
