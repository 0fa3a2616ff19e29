"""Resuming: the newest checkpoint that loads, falling back over any number of damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, place_exists
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.quarantine import is_refusal
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    NoValidCheckpointError,
    StoreError,
)

__all__ = ["restore_newest"]

_ALL_DAMAGED = (
    "every checkpoint in {path} is damaged:\n  {damaged}\nThe live objects may be in a mixed state. Restore "
    "one of them from a copy, or give the run a new directory to start over"
)
_REFUSED = (
    "{path} can't be read: {reason}. It may well be whole, so it was not set aside and no older checkpoint "
    "was taken. Give this process what it lacks and start it again"
)


def restore_newest(
    root: catalog.Root, objects: Any, set_aside: Callable[[Place, str], None]
) -> Checkpoint | None:
    """Restore the newest checkpoint of a store that loads.

    Args:
        root: of the store.
        objects: live objects; see `Checkpoint.load_into`.
        set_aside: is handed each damaged one and what is wrong with it; the next older one overwrites what
            that one had written.

    Returns:
        The checkpoint that was restored; None if the store holds none.

    Raises:
        NoValidCheckpointError: there are checkpoints, and all are damaged.
        StoreError: the system refuses to read; nothing more is set aside.
    """
    damaged = [f"{name}: set aside earlier" for name in catalog.names_set_aside(root)]
    passed: set[int] = set()
    while entries := [entry for entry in catalog.scan(root) if entry.number not in passed]:
        entry = entries[-1]
        passed.add(entry.number)
        try:
            checkpoint = Checkpoint(entry.path, read_manifest(entry.path))
            checkpoint.load_into(objects)
        except CheckpointNotFoundError:
            continue  # dropped meanwhile by the process that writes; it has a newer one
        except DamagedCheckpointError as error:
            if place_exists(entry.path):
                if is_refusal(error):
                    raise StoreError(_REFUSED.format(path=entry.path, reason=error.message)) from error
                damaged.append(f"{entry.name}: {error.message}")
                set_aside(entry.path, error.message)
            continue
        return checkpoint
    if damaged:
        raise NoValidCheckpointError(_ALL_DAMAGED.format(path=root, damaged="\n  ".join(damaged)))
    return None
