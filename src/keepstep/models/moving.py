"""Trees of tensors from one device to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch

from keepstep.world.nested import like

__all__ = ["send_to_device"]


def send_to_device(
    value: Any, device: torch.device, *, non_blocking: bool = False, skip_keys: Sequence[str] = ()
) -> Any:
    """Move every tensor in a nesting of dicts, lists, tuples, named tuples and objects with `.to`.

    Containers keep their types; one of which nothing had to move stays itself, as does everything else.

    Args:
        value: the tree.
        device: where to.
        non_blocking: let copies overlap with computation; the memory should be pinned then.
        skip_keys: what lies under these keys of a mapping is not moved.
    """
    return _sent(value, device, non_blocking, skip_keys)


def _sent(value: Any, device: torch.device, non_blocking: bool, skip_keys: Sequence[str]) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=non_blocking)
    if isinstance(value, list | tuple):
        items = [_sent(item, device, non_blocking, skip_keys) for item in value]
        if all(map(is_, items, value)):
            return value
        return like(value, items)
    # Batch classes are often mappings that know how to move themselves.
    if hasattr(value, "to"):
        return _move_object(value, device, non_blocking)
    if isinstance(value, Mapping):
        moved = [
            item if key in skip_keys else _sent(item, device, non_blocking, skip_keys)
            for key, item in value.items()
        ]
        return value if all(map(is_, moved, value.values())) else like(value, moved)
    return value


def _move_object(value: Any, device: torch.device, non_blocking: bool) -> Any:
    try:
        return value.to(device, non_blocking=non_blocking)
    except TypeError:
        # Not every `.to` knows the option.
        return value.to(device)
