"""Resuming: the newest checkpoint that loads, falling back over any number of damaged ones."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, place_exists
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.refusal import is_refusal, refused
from keepstep.checkpoint.one_for_all import by_rank_0
from keepstep.checkpoint.place.backend import checkpoint_name
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    NoValidCheckpointError,
    StoreError,
)
from keepstep.meetings import Meeting
from keepstep.world import World

__all__ = ["Restore", "newest_whole", "restore_newest"]

log = logging.getLogger(__name__)

Restore = Callable[[Checkpoint, Callable[[], object]], None]
"""Loads a checkpoint into live objects; calls what it is handed before it overwrites any, see `load_into`."""

_ALL_DAMAGED = (
    "every checkpoint in {path} is damaged:\n  {damaged}\nThe live objects may be in a mixed state. Restore "
    "one of them from a copy, or give the run a new directory to start over{rescue}"
)
_RESCUE = (
    '. Parts that are whole can still be loaded, as Checkpoint.open("{place}").load(only="model"); '
    "`keepstep verify {place}` says which files are not"
)
_RESCUE_IN_BUCKET = (
    ". Nothing but the manifests was moved, to {folder}: to load parts that are whole, copy one back to "
    '{root}/{name}/manifest.json, then Checkpoint.open("{root}/{name}").load(only="model")'
)
_SET_ASIDE = "set aside earlier"
_UNSEEN = (
    "{name} is in {root}, but the ranks {ranks} don't see it there: all ranks must see one file system. "
    "Nothing was set aside. Mount the same directory on every machine, or wait until all of them show it"
)
_GONE = ""
_NO_MANIFEST = (
    "passing over %s: it has a state.json and no manifest.json, so it was copied in part, or has lost that "
    "file. If it is whole elsewhere, stop the run and copy the directory again; else remove it"
)


def newest_whole(root: catalog.Root) -> Checkpoint | None:
    """The newest checkpoint whose manifest is sound and whose files are all there and whole in size.

    Damaged ones are named in a warning and passed over.

    Raises:
        StoreError: one that is newer than all whole ones can't be read, and may well be whole.
    """
    gone = False
    for entry in reversed(catalog.scan(root)):
        problem = catalog.problem_of(entry)
        if problem is None and entry.manifest is not None:
            _tell_of_lost_manifests(root, entry.number)
            return Checkpoint(entry.path, entry.manifest)
        if not place_exists(entry.path):
            gone = True
        elif problem is not None and problem.refused:
            raise refused(entry.path, problem.reason)
        elif problem is not None:
            log.warning("passing over the damaged checkpoint %s: %s", entry.path, problem.reason)
    if gone:  # who deletes an older one has saved a newer one
        return newest_whole(root)
    _tell_of_lost_manifests(root)
    return None


def _tell_of_lost_manifests(root: catalog.Root, newer_than: int = -1) -> None:
    """Warn of what was a checkpoint, or was to become one by copying, and has no manifest.

    Args:
        root: of the store.
        newer_than: number of the checkpoint that is taken; -1: none is.
    """
    for number, place in catalog.backend_of(root).checkpoints():
        if number > newer_than and isinstance(place, Path) and catalog.has_lost_manifest(place):
            log.warning(_NO_MANIFEST, place)


def restore_newest(
    root: catalog.Root,
    restore: Restore,
    set_aside: Callable[[Place, str], bool],
    world: World,
) -> Checkpoint | None:
    """Restore the newest checkpoint of a store that loads.

    Args:
        root: of the store.
        restore: loads a checkpoint into live objects.
        set_aside: is handed each damaged one and what is wrong with it, and says whether a sound copy of it
            stands there by now: then that one is tried, once. Else the next older one overwrites what the
            damaged one had written.
        world: the ranks; all of them take the same checkpoint.

    Returns:
        The checkpoint that was restored; None if the store holds none.

    Raises:
        NoValidCheckpointError: there are checkpoints, and all are damaged.
        StoreError: the system refuses to read; nothing more is set aside.
        RankError: another rank could not restore for another reason than damage, or did not come.
    """
    damaged = dict.fromkeys(catalog.names_set_aside(root), _SET_ASIDE)
    passed: set[int] = set()
    replaced: set[int] = set()
    while True:
        with world.meeting(f"resuming {root}") as meeting:
            entries = [entry for entry in catalog.scan(root) if entry.number not in passed]
            picks = meeting.exchange(str(entries[-1].number if entries else -1).encode())
            number = int(picks[0])  # rank 0's word: a file system may show it to some before others
            if number < 0:
                checkpoint = None
                break
            passed.add(number)
            entry = _entry(entries, number) or _entry(catalog.scan(root), number)
            checkpoint, problem = _try(entry, restore, meeting)
            problems = [json.loads(data) for data in meeting.exchange(json.dumps(problem).encode())]
            found = "; ".join(_by_rank(problems))
            gone = [rank for rank, text in enumerate(problems) if text == _GONE]
            if 0 < len(gone) < world.size and not found and meeting.broadcast(_seen(root, number)):
                raise StoreError(_UNSEEN.format(name=checkpoint_name(number), root=root, ranks=gone))
        if checkpoint is not None and not found and not gone:
            break
        if not found:
            continue  # dropped meanwhile by the process that writes; it has a newer one
        damaged[checkpoint_name(number)] = found
        put_right = functools.partial(_put_right, entry, found, set_aside)
        if by_rank_0(world, f"resuming {root}", put_right) and number not in replaced:
            replaced.add(number)
            passed.discard(number)
    if world.rank == 0:
        _tell_of_lost_manifests(root, number)
    if checkpoint is None and damaged:
        raise _all_damaged(root, damaged)
    return checkpoint


def _put_right(entry: catalog.Entry | None, found: str, set_aside: Callable[[Place, str], bool]) -> bool:
    """Set a damaged checkpoint aside if it is there still; whether a sound copy of it stands there now."""
    return entry is not None and place_exists(entry.path) and set_aside(entry.path, found)


def _all_damaged(root: catalog.Root, damaged: Mapping[str, str]) -> NoValidCheckpointError:
    """Names by reason, where they lie, and what can be done with what is left.

    Args:
        root: of the store.
        damaged: what is wrong with each checkpoint, by name.
    """
    names: dict[str, list[str]] = {}
    for name, reason in damaged.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{_listed(group)}: {reason}" for reason, group in names.items()]
    aside = {place.name: place for _, place in catalog.backend_of(root).set_aside_before()}
    newest = max(damaged, key=lambda name: int(name.rpartition("_")[2]))
    if newest not in aside:
        rescue = _RESCUE.format(place=f"{root}/{newest}")
    elif isinstance(aside[newest], Path):
        rescue = _RESCUE.format(place=aside[newest])
    else:
        folder = str(aside[newest]).rpartition("/")[0]
        rescue = _RESCUE_IN_BUCKET.format(folder=folder, root=root, name=newest)
    return NoValidCheckpointError(_ALL_DAMAGED.format(path=root, damaged="\n  ".join(lines), rescue=rescue))


def _listed(names: Sequence[str]) -> str:
    """All of a few names; of many the first and the last."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, ..., {names[-1]} ({len(names)} checkpoints)"


class _HeldBackError(Exception):
    """Another rank can't restore the checkpoint, so this one overwrites nothing."""


def _try(
    entry: catalog.Entry | None, restore: Restore, meeting: Meeting
) -> tuple[Checkpoint | None, str | None]:
    """Restore one checkpoint, if all ranks can: it, or what is wrong with it."""
    told = False

    def agree() -> None:
        nonlocal told
        told = True
        if not all(meeting.exchange(b"ready")):
            raise _HeldBackError

    try:
        tried = _try_alone(entry, lambda checkpoint: restore(checkpoint, agree))
    except _HeldBackError:
        return None, None
    if not told:  # damaged, or gone: the others hold back
        meeting.exchange(b"")
    return tried


def _try_alone(
    entry: catalog.Entry | None, restore: Callable[[Checkpoint], None]
) -> tuple[Checkpoint | None, str | None]:
    """Restore one checkpoint: it, or what is wrong with it; nothing is wrong with one that is gone."""
    if entry is None:
        return None, _GONE
    try:
        checkpoint = Checkpoint(entry.path, read_manifest(entry.path))
        restore(checkpoint)
    except CheckpointNotFoundError:
        return None, _GONE
    except DamagedCheckpointError as error:
        if not place_exists(entry.path):
            return None, _GONE
        if is_refusal(error):
            raise refused(entry.path, error.message) from error
        return None, error.message or "damaged"
    return checkpoint, None


def _by_rank(problems: Sequence[str | None]) -> list[str]:
    """What is wrong, and which ranks say so if there are several."""
    if len(problems) == 1:
        return [problems[0]] if problems[0] else []
    return [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]


def _seen(root: catalog.Root, number: int) -> bytes:
    return b"there" if _entry(catalog.scan(root), number) else b""


def _entry(entries: Sequence[catalog.Entry], number: int) -> catalog.Entry | None:
    return next((entry for entry in entries if entry.number == number), None)
