"""Looking inside an encoded tree without rebuilding it."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from keepstep.errors import UsageError
from keepstep.tree.decode import unflatten
from keepstep.tree.leaf import address_of

__all__ = ["elements_of", "inside_object", "items_of", "select", "tensors_in"]


def inside_object(node: Any) -> Any:
    """The encoded state of a live object; any other node is returned as it is."""
    return node["state"] if type(node) is dict and "$object" in node else node


def items_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Decoded keys and encoded values of an encoded mapping; None if the node is none.

    Raises:
        ValueError: for a mapping that `flatten` cannot have made.
    """
    if type(node) is not dict:
        return None
    first = next(iter(node), "")
    if not first.startswith("$"):
        return list(node.items())
    if first not in _MAPPINGS:
        return None
    return [(unflatten(key, _no_tensor), item) for key, item in node[first]]


def elements_of(node: Any) -> tuple[list[Any], bool] | None:
    """Encoded elements of an encoded list (or tuple: then True); None if the node is neither."""
    if type(node) is list:
        return node, False
    if type(node) is dict and type(node.get("$tuple")) is list:
        return node["$tuple"], True
    return None


def tensors_in(node: Any) -> Iterator[str]:
    """Addresses of all tensors and arrays in an encoded tree.

    Raises:
        ValueError: for a reference that `flatten` cannot have made.
    """
    if type(node) is dict:
        for key, item in node.items():
            if key in ("$tensor", "$ndarray"):
                if type(item) is not str:
                    raise ValueError(f"{key} is {item!r:.100}, not an address")
                yield item
            else:
                yield from tensors_in(item)
    elif type(node) is list:
        for item in node:
            yield from tensors_in(item)


def select(tree: Any, patterns: Sequence[str]) -> Any:
    """Only those parts of an encoded tree whose address matches.

    A pattern is an address ("model", "model/h.0.ln.weight", "optimizer/state.0") or a shell glob over
    addresses ("model/h.0.*"). Mappings lose what doesn't match; a list or tuple in which something
    matches stays whole, so that no index shifts.

    Raises:
        UsageError: nothing matches.
    """
    chosen, found = _select(tree, (), patterns)
    if not found:
        names = [str(key) for key, _ in items_of(inside_object(tree)) or ()]
        raise UsageError(
            f"only={list(patterns)!r} matches nothing in this checkpoint; "
            f"its root holds: {', '.join(names) or 'no names'}"
        )
    return chosen


def _select(node: Any, path: tuple[Any, ...], patterns: Sequence[str]) -> tuple[Any, bool]:
    address = address_of(path)
    if path and any(address == pattern or fnmatch.fnmatchcase(address, pattern) for pattern in patterns):
        return node, True
    if type(node) is dict and "$object" in node:
        state, found = _select(node["state"], path, patterns)
        return {**node, "state": state}, found
    items = items_of(node)
    if items is None:
        elements = elements_of(node)
        found = elements is not None and any(
            _select(item, (*path, index), patterns)[1] for index, item in enumerate(elements[0])
        )
        return node, found
    results = [_select(item, (*path, key), patterns) for key, item in items]
    first = next(iter(node), "")
    if first in _MAPPINGS:
        pairs = zip(node[first], results, strict=True)
        chosen: Any = {**node, first: [[key, item] for (key, _), (item, found) in pairs if found]}
    else:
        chosen = {key: item for (key, _), (item, found) in zip(items, results, strict=True) if found}
    return chosen, any(found for _, found in results)


_MAPPINGS = ("$dict", "$ordered", "$defaultdict", "$counter")


def _no_tensor(address: str) -> torch.Tensor:
    raise ValueError(f"a key refers to the tensor {address!r}")
