"""Damaged checkpoints are moved out of the way, never deleted: a person may want what is left of them."""

from __future__ import annotations

from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.keeping.catalog import Root, backend_of

__all__ = ["set_aside"]


def set_aside(root: Root, place: Place) -> Place:
    """Move a checkpoint of a store into `.keepstep/damaged/`; its number is never used again.

    Returns:
        Where it lies now.

    Raises:
        OSError, StoreError: the disk refuses; it is where it was.
    """
    return backend_of(root).set_aside(place)
