"""Flat names and nested states: DCP's flattening undone, and done to what was saved without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from keepstep.tree import inside_object, items_of

__all__ = ["Branch", "Places", "encoded", "leaves", "plant"]


class Branch(dict[Any, Any]):
    """A container on the way from the root to the values."""


def plant(root: dict[Any, Any], path: Sequence[Any], node: Any) -> None:
    """Put an encoded value where its path says."""
    for key in path[:-1]:
        root = root.setdefault(key, Branch())
    root[path[-1]] = node


def encoded(branch: dict[Any, Any]) -> Any:
    """Containers as they are encoded: whole numbers are places in a list, anything else keys of a dict."""
    children = {key: encoded(child) if isinstance(child, Branch) else child for key, child in branch.items()}
    if children and all(type(key) is int for key in children):
        return [children.get(index) for index in range(max(children) + 1)]
    if all(type(key) is str and not key.startswith("$") for key in children):
        return children
    return {"$dict": [[key, child] for key, child in children.items()]}


def leaves(node: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The leaves that DCP's own flattening finds: it goes into dicts, and lists with tensors or dicts."""
    node = inside_object(node)
    items = items_of(node)
    if items is not None:
        for key, child in items:
            yield from leaves(child, (*path, str(key)))
    elif type(node) is list and any(map(_is_inner, node)):
        for index, child in enumerate(node):
            yield from leaves(child, (*path, index))
    else:
        yield path, node


def _is_inner(node: Any) -> bool:
    """Whether DCP would go into a list for this element."""
    node = inside_object(node)
    if type(node) is list:
        return any(map(_is_inner, node))
    return items_of(node) is not None or (type(node) is dict and "$tensor" in node)


class Places:
    """Where a live state keeps its values, by DCP's paths: these hold the text of each key of a mapping.

    Args:
        state: nested mappings and lists.
    """

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self._state = state
        self._by_text: dict[int, tuple[Any, dict[str, list[Any]]]] = {}  # holds it: ids are reused

    def find(self, path: Sequence[Any]) -> tuple[Any, Any] | None:
        """The container and the key of a value there; None if there is none."""
        return next(self._along(self._state, path), None)

    def _along(self, container: Any, path: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for key in self._keys(container, path[0]):
            if len(path) == 1:
                yield container, key
            else:  # of {0: {"a": x}, "0": {"b": y}} only one leads on
                yield from self._along(container[key], path[1:])

    def _keys(self, container: Any, key: Any) -> Sequence[Any]:
        if isinstance(container, list):
            return [key] if type(key) is int and key < len(container) else []
        if not isinstance(container, Mapping):
            return []
        if id(container) not in self._by_text:
            keys: dict[str, list[Any]] = {}
            for each in container:
                keys.setdefault(str(each), []).append(each)
            self._by_text[id(container)] = container, keys
        return self._by_text[id(container)][1].get(str(key), [])
