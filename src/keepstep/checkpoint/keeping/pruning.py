"""Retention at work: look at what is there, decide, delete. No torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from keepstep.checkpoint.format.known import KnownManifests
from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.parse import check_files
from keepstep.checkpoint.format.source import Place, place_exists, source_of
from keepstep.checkpoint.keeping.catalog import Entry, Root, backend_of, problem_of, scan
from keepstep.checkpoint.keeping.retention import Held, Retention, decide
from keepstep.errors import CheckpointBusyError, DamagedCheckpointError, StoreError

__all__ = ["Which", "check_committed", "drop", "prune", "survey"]

log = logging.getLogger(__name__)


Which = Callable[[Manifest], bool] | None
"""Which checkpoints rules are about; None: all."""


def survey(
    root: Root, of: Which = None, known: KnownManifests | None = None
) -> tuple[list[Entry], dict[int, Held]]:
    """What a store holds, as far as can be seen without reading data.

    Args:
        root: of the store.
        of: which checkpoints; the others are left out.
        known: manifests that need not be read again.

    Returns:
        The checkpoints, oldest first, those that lack files or have some of a wrong size without their
        manifest; and what each takes on this disk.
    """
    entries, held = [], {}
    for entry in scan(root, known):
        problem = problem_of(entry)
        if problem is not None and not place_exists(entry.path):
            continue
        if problem is None:
            entries.append(entry)
        else:
            entries.append(replace(entry, manifest=None, problem=problem.reason, refused=problem.refused))
        held[entry.number] = _held(entry)
    if of is not None:
        entries = [entry for entry in entries if entry.manifest is not None and of(entry.manifest)]
    return entries, held


def _held(entry: Entry) -> Held:
    return source_of(entry.path).held(entry.manifest.files) if entry.manifest else {}


def check_committed(place: Place, manifest: Manifest, known: KnownManifests) -> None:
    """See that a checkpoint that was committed just now can stand in for those that are to go.

    The manifest is read back, and every file is there in its size. The data was hashed on its way to the
    disk, and the disk has said that it holds it; reading it again would cost as much as the save, and would
    mostly read the cache. `Store.verify` and a scrub read it.

    Args:
        place: where it was committed.
        manifest: what was committed.
        known: takes note of the manifest that was found.

    Raises:
        DamagedCheckpointError: it can't.
    """
    found = known.read(place)
    if found.id != manifest.id:
        raise DamagedCheckpointError(place, "its manifest is not the one that was committed")
    check_files(place, found)


def prune(
    root: Root, retention: Retention, of: Which = None, known: KnownManifests | None = None
) -> list[str]:
    """Delete what the rules do not keep; one that is being read is left for the next time.

    Args:
        root: of the store.
        retention: the rules.
        of: which checkpoints they are about; the others count for nothing and stay. None: all.
        known: manifests that need not be read again.

    Returns:
        The names of the deleted checkpoints.

    Raises:
        StoreError: the disk refuses.
    """
    entries, held = survey(root, of, known)
    dropped = []
    for decision in decide(entries, retention, held):
        if not decision.keep and drop(root, decision.entry):
            log.debug(
                "deleted %s: %s; %d bytes freed", decision.entry.path, decision.reason, decision.frees_bytes
            )
            dropped.append(decision.entry.name)
    return dropped


def drop(root: Root, entry: Entry) -> bool:
    """Delete a checkpoint that a rule drops; False if it was not this call that did it."""
    try:
        backend_of(root).delete(entry.path)
    except CheckpointBusyError as error:
        log.info("%s; it goes at a later save", error)
        return False
    except StoreError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        return False  # somebody else deleted it first
    return True
