"""Are two states the same, to the bit and to the type? Stricter than `==`: NaN payloads and -0.0 count."""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch

from keepstep.dense import flat_bytes


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return flat_bytes(dense).numpy().tobytes()


def difference(left: Any, right: Any, place: str = "state") -> str | None:
    """The first difference between two states, in words, or None."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        return (
            None if same and tensor_bytes(left) == tensor_bytes(right) else f"{place}: {left!r} != {right!r}"
        )
    if type(left) is not type(right) and not (isinstance(left, np.ndarray) and isinstance(right, np.ndarray)):
        return f"{place}: {type(left).__name__} {left!r:.60} != {type(right).__name__} {right!r:.60}"
    if isinstance(left, np.ndarray | np.generic):
        same = left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
        return None if same else f"{place}: {left!r} != {right!r}"
    if isinstance(left, float):
        return (
            None if struct.pack("d", left) == struct.pack("d", right) else f"{place}: {left!r} != {right!r}"
        )
    if isinstance(left, complex):
        return difference([left.real, left.imag], [right.real, right.imag], place)
    if isinstance(left, dict):
        return _mapping_difference(left, right, place)
    if isinstance(left, list | tuple | deque) and not isinstance(left, torch.Size):
        if len(left) != len(right) or getattr(left, "maxlen", None) != getattr(right, "maxlen", None):
            return f"{place}: {len(left)} elements != {len(right)}"
        return _first(
            difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(left, right, strict=True))
        )
    if isinstance(left, set | frozenset):
        a, b = sorted(left, key=_order), sorted(right, key=_order)
        return difference(a, b, place)
    if hasattr(left, "fold"):
        same = (left.replace(tzinfo=None), left.fold, left.tzinfo, left.tzname()) == (
            right.replace(tzinfo=None),
            right.fold,
            right.tzinfo,
            right.tzname(),
        )
        return None if same else f"{place}: {left!r} != {right!r}"
    return None if left == right else f"{place}: {left!r} != {right!r}"


def _mapping_difference(left: Any, right: Any, place: str) -> str | None:
    if len(left) != len(right):
        return f"{place}: keys {list(left)} != {list(right)}"
    if isinstance(left, defaultdict) and left.default_factory is not right.default_factory:
        return f"{place}: default factories differ"
    if isinstance(left, OrderedDict):
        found = difference(
            getattr(left, "_metadata", None), getattr(right, "_metadata", None), f"{place}._metadata"
        )
        if found:
            return found
    pairs = zip(left.items(), right.items(), strict=True)
    if isinstance(left, Counter):
        pairs = zip(sorted(left.items(), key=_order), sorted(right.items(), key=_order), strict=True)
    return _first(
        difference(k1, k2, f"{place}<key {k1!r}>") or difference(v1, v2, f"{place}[{k1!r}]")
        for (k1, v1), (k2, v2) in pairs
    )


def _order(value: Any) -> str:
    """A text to sort by that does not depend on the order in which a set shows its items."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}{sorted(map(_order, value))}"
    if isinstance(value, tuple):
        return f"tuple{[_order(item) for item in value]}"
    return repr(value)


def _first(found: Any) -> str | None:
    return next((text for text in found if text), None)


def assert_same(left: Any, right: Any) -> None:
    assert difference(left, right) is None, difference(left, right)
