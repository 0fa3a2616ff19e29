"""Trees of tensors in one process: lists, tuples, named tuples and mappings, nested in any way.

Names are Accelerate's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from keepstep.errors import NotTensorError, UsageError
from keepstep.world.nested import is_container, leaves_of, like, place_of, replaced

__all__ = [
    "TensorInformation",
    "concatenate",
    "convert_outputs_to_fp32",
    "convert_to_fp32",
    "find_batch_size",
    "find_device",
    "get_data_structure",
    "honor_type",
    "ignorant_find_batch_size",
    "initialize_tensors",
    "is_namedtuple",
    "is_tensor_information",
    "is_torch_tensor",
    "listify",
    "merge_dicts",
    "recursively_apply",
    "slice_tensors",
]

T = TypeVar("T")


@dataclass
class TensorInformation:
    """What it takes to make a tensor like another."""

    shape: torch.Size
    dtype: torch.dtype


def is_torch_tensor(tensor: object) -> bool:
    """Whether it is a tensor."""
    return isinstance(tensor, torch.Tensor)


def is_tensor_information(tensor_info: object) -> bool:
    """Whether it is a `TensorInformation`."""
    return isinstance(tensor_info, TensorInformation)


def is_namedtuple(data: object) -> bool:
    """Whether it is a named tuple."""
    return isinstance(data, tuple) and hasattr(data, "_asdict") and hasattr(data, "_fields")


def honor_type(obj: Any, generator: Iterable[Any]) -> Any:
    """A list, tuple or named tuple of the type of `obj`, with other items."""
    return like(obj, list(generator))


def recursively_apply(
    func: Callable[..., Any],
    data: Any,
    *args: Any,
    test_type: Callable[[Any], bool] = is_torch_tensor,
    error_on_other_type: bool = False,
    **kwargs: Any,
) -> Any:
    """Apply a function to each leaf of a tree.

    Args:
        func: gets a leaf, `args` and `kwargs`.
        data: the tree.
        args: for `func`.
        test_type: says which leaves `func` is for.
        error_on_other_type: raise for other leaves, instead of leaving them as they are.
        kwargs: for `func`.

    Raises:
        NotTensorError: another leaf; the message names its place.
    """
    leaves = []
    for path, leaf in leaves_of(data):
        if test_type(leaf):
            leaf = func(leaf, *args, **kwargs)
        elif error_on_other_type:
            name = getattr(func, "__name__", "the function")
            wanted = getattr(test_type, "__name__", "the test")
            raise NotTensorError(
                f"{name}: {place_of(path)} is of type {type(leaf).__name__} ({leaf!r:.60}), which {wanted} "
                "does not accept; give it lists, tuples, named tuples and dicts of what it does accept"
            )
        leaves.append(leaf)
    return replaced(data, iter(leaves))


def find_batch_size(data: Any) -> int:
    """The number of rows of a tree's first tensor.

    Raises:
        UsageError: the tree is empty.
        NotTensorError: its first leaf is no tensor, or one without dimensions.
    """
    path, first = next(leaves_of(data), ((), None))
    if first is None and is_container(data):
        raise UsageError(
            f"find_batch_size: {type(data).__name__} without a tensor: there is no batch to measure"
        )
    if not isinstance(first, torch.Tensor) or first.dim() == 0:
        raise NotTensorError(
            f"find_batch_size: {place_of(path)} is {first!r:.60}; expected a tensor with rows"
        )
    return first.shape[0]


def ignorant_find_batch_size(data: Any) -> int | None:
    """As `find_batch_size`, but None where that raises."""
    try:
        return find_batch_size(data)
    except UsageError:
        return None


def slice_tensors(
    data: T,
    tensor_slice: Any,
    process_index: int | None = None,  # noqa: ARG001 (Accelerate takes and ignores it)
    num_processes: int | None = None,  # noqa: ARG001
) -> T:
    """`data[tensor_slice]` for each tensor; other leaves stay.

    Args:
        data: the tree.
        tensor_slice: a slice, or whatever else indexes a tensor.
        process_index: without effect.
        num_processes: without effect.
    """
    sliced: T = recursively_apply(lambda tensor: tensor[tensor_slice], data)
    return sliced


def concatenate(data: Any, dim: int = 0) -> Any:
    """Concatenate trees of one structure, tensor by tensor.

    Args:
        data: a list or tuple of trees.
        dim: the dimension along which tensors are put together.

    Raises:
        UsageError: there is nothing to concatenate.
        NotTensorError: a leaf is no tensor, and there are several trees.
    """
    if not isinstance(data, list | tuple) or not data:
        raise UsageError(f"concatenate: got {data!r:.60}; expected a list or tuple of at least one tree")
    first = data[0]
    if isinstance(first, Mapping):
        return like(first, [concatenate([tree[key] for tree in data], dim=dim) for key in first])
    if isinstance(first, list | tuple):
        return like(first, [concatenate([tree[n] for tree in data], dim=dim) for n in range(len(first))])
    if isinstance(first, torch.Tensor):
        return torch.cat(list(data), dim=dim)
    if len(data) == 1:
        return first
    raise NotTensorError(
        f"concatenate: a leaf is of type {type(first).__name__} ({first!r:.60}); only tensors can be"
    )


def convert_to_fp32(tensor: T) -> T:
    """Each fp16 and bf16 tensor in fp32; other leaves stay."""
    converted: T = recursively_apply(lambda leaf: leaf.float(), tensor, test_type=_is_half)
    return converted


def _is_half(value: Any) -> bool:
    return getattr(value, "dtype", None) in {torch.float16, torch.bfloat16}


def convert_outputs_to_fp32(model_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function so that what it returns is in fp32 where it was in fp16 or bf16."""

    @functools.wraps(model_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return convert_to_fp32(model_forward(*args, **kwargs))

    return forward


def find_device(data: Any) -> torch.device | None:
    """The device of a tree's first tensor; None if it has none."""
    return next((leaf.device for _, leaf in leaves_of(data) if isinstance(leaf, torch.Tensor)), None)


def get_data_structure(data: Any) -> Any:
    """The tree with a `TensorInformation` in the place of each tensor."""
    return recursively_apply(lambda leaf: TensorInformation(shape=leaf.shape, dtype=leaf.dtype), data)


def initialize_tensors(data_structure: Any) -> Any:
    """The tree with an empty tensor in the place of each `TensorInformation`."""
    return recursively_apply(
        lambda told: torch.empty(told.shape, dtype=told.dtype),
        data_structure,
        test_type=is_tensor_information,
    )


def listify(data: Any) -> Any:
    """The tree with nested lists of numbers in the place of tensors."""
    return recursively_apply(lambda leaf: leaf.detach().cpu().tolist(), data)


def merge_dicts(source: Mapping[str, Any], destination: dict[str, Any]) -> dict[str, Any]:
    """Write a nested dict over another one, in place; what only the other has stays.

    Returns:
        `destination`.
    """
    for key, value in source.items():
        if isinstance(value, Mapping):
            below = destination.get(key)
            destination[key] = merge_dicts(value, below if isinstance(below, dict) else {})
        else:
            destination[key] = value
    return destination
