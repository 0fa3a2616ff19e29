"""What JSON holds of a value, or that it doesn't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["plain", "same", "shown"]


class _OpaqueError(Exception):
    """Something that JSON does not hold."""


def plain(value: Any) -> Any:
    """A copy of a value as JSON gives it back, tuples as lists; None if JSON does not hold all of it."""
    try:
        return _copied(value)
    except _OpaqueError:
        return None


def shown(values: Mapping[str, Any]) -> dict[str, Any]:
    """Named values as JSON gives them back; of what JSON does not hold, how it looks."""
    return {
        name: repr(value)[:200] if _is_opaque(value) else _copied(value) for name, value in values.items()
    }


def _is_opaque(value: Any) -> bool:
    return value is not None and plain(value) is None


def _copied(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):  # numpy's float64 is a float
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise _OpaqueError
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(inner) for inner in value]
    item = getattr(value, "item", None)
    if item is not None and getattr(value, "ndim", None) == 0:
        return _copied(item())
    raise _OpaqueError


def same(first: Any, second: Any) -> bool:
    """Whether two plain values are one; NaN is NaN."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    both_nan = first != first and second != second
    return bool(first == second or both_nan)
