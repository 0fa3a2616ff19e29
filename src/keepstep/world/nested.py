"""Trees of tensors: lists, tuples, named tuples and mappings, nested in any way."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

import torch

from keepstep.errors import NotTensorError, UsageError
from keepstep.world.protocol import Reduction

__all__ = [
    "checked_reduction",
    "described",
    "is_container",
    "leaves_of",
    "like",
    "mapped",
    "place_of",
    "replaced",
    "tensors_of",
]

Path = tuple[Any, ...]


def is_container(value: object) -> bool:
    """Whether a value is a node of a tree, not a leaf."""
    return isinstance(value, list | tuple | Mapping)


def like(container: Any, items: Sequence[Any]) -> Any:
    """A container of the type of `container`, with other items: a mapping keeps its keys, in their order."""
    if isinstance(container, Mapping):
        pairs = dict(zip(container, items, strict=True))
        if isinstance(container, collections.defaultdict):
            return type(container)(container.default_factory, pairs)
        return pairs if type(container) is dict else type(container)(pairs)  # type: ignore[call-arg]
    if hasattr(container, "_fields"):
        return type(container)(*items)
    return type(container)(items)


def leaves_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Each leaf with its path, in order."""
    if not is_container(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves_of(item, (*path, key))
    else:
        for index, item in enumerate(tree):
            yield from leaves_of(item, (*path, index))


def replaced(tree: Any, leaves: Iterator[Any]) -> Any:
    """`tree` with other leaves, in the order of `leaves_of`."""
    if not is_container(tree):
        return next(leaves)
    items = tree.values() if isinstance(tree, Mapping) else tree
    return like(tree, [replaced(item, leaves) for item in items])


def tensors_of(tree: Any, purpose: str) -> list[tuple[Path, torch.Tensor]]:
    """Each tensor with its path.

    Raises:
        NotTensorError: a leaf is none, or one without plain values in rows; names its place.
    """
    found = list(leaves_of(tree))
    for path, leaf in found:
        if not isinstance(leaf, torch.Tensor):
            raise NotTensorError(
                f"{purpose}: {place_of(path)} is of type {type(leaf).__name__} ({leaf!r:.60}); {purpose} "
                "takes tensors in any nesting of lists, tuples, named tuples and dicts. Make it a tensor, or "
                "use gather_object() for other objects"
            )
        if leaf.layout != torch.strided or leaf.is_nested or hasattr(leaf, "full_tensor"):
            kind = "a sharded tensor" if hasattr(leaf, "full_tensor") else f"a tensor of layout {leaf.layout}"
            raise NotTensorError(
                f"{purpose}: {place_of(path)} is {kind}; {purpose} takes dense tensors. Make it one first, "
                "with .full_tensor() (sharded), .to_dense() (sparse) or .to_padded_tensor() (nested)"
            )
    return found


def mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor], purpose: str) -> Any:
    """`tree` with each tensor changed; raises NotTensorError for other leaves."""
    return replaced(tree, iter([change(tensor) for _, tensor in tensors_of(tree, purpose)]))


def place_of(path: Path) -> str:
    """A path as one would write it in Python; "its argument" for the root."""
    return "".join(f"[{part!r}]" for part in path) if path else "its argument"


def described(leaves: Sequence[tuple[Path, torch.Tensor]]) -> str:
    """One line a tensor: place, dtype, shape and, beyond the CPU, kind of device."""
    return "\n".join(
        f"{place_of(path)}: {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        + (f" on {tensor.device.type}" if tensor.device.type != "cpu" else "")
        for path, tensor in leaves
    )


def checked_reduction(how: str) -> None:
    """Raise UsageError for what is no `Reduction`."""
    if how not in get_args(Reduction):
        raise UsageError(f"reduction is {how!r}; allowed: {', '.join(map(repr, get_args(Reduction)))}")
