"""Deletes checkpoints of trials, and sweeps what starts of trials that died have left. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from keepstep.tune.places import open_place

__all__ = ["delete", "sweep"]


def delete(path: str, names: Iterable[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Delete checkpoints of a trial; one that is gone already is no error.

    Args:
        path: the address of the trial's directory.
        names: of its checkpoints; while the trial runs, not the newest of them.
        storage_options: for a bucket.

    Returns:
        The names of those that are being read; they have to be deleted later.

    Raises:
        StoreError: the place refuses.
    """
    place = open_place(path, storage_options)
    return [name for name in names if not place.delete(name)]


def sweep(path: str, known: Collection[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Remove what starts of a trial that died have left: unfinished checkpoints, and unreported ones.

    Only for a trial that does not run.

    Args:
        path: the address of the trial's directory; it may be missing.
        known: the names of the checkpoints that the journal has.
        storage_options: for a bucket.

    Returns:
        The names of the committed checkpoints that were removed.

    Raises:
        StoreError: the place refuses.
    """
    place = open_place(path, storage_options)
    place.sweep()
    return [name for name in place.names() if name not in known and place.delete(name)]
