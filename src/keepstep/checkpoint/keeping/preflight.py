"""Will the next checkpoint fit? Asked before it is written: old ones can go first, or a person be told."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from keepstep.checkpoint.keeping.catalog import Entry, Root, backend_of
from keepstep.checkpoint.keeping.pruning import Which, drop, survey
from keepstep.checkpoint.keeping.retention import Decision, Held, Retention, decide
from keepstep.errors import StoreError

__all__ = ["Preflight", "to_make_room"]

log = logging.getLogger(__name__)


def to_make_room(
    entries: Sequence[Entry],
    retention: Retention,
    held: Mapping[int, Held],
    *,
    needed_bytes: int,
    now: dt.datetime,
) -> list[Decision]:
    """What the rules would drop if the next checkpoint were there already, oldest first.

    The newest one that is there stays: the next may fail.

    Args:
        entries: oldest first; without a manifest if damaged.
        retention: the rules.
        held: what each takes, by number.
        needed_bytes: the size of the next one, with what it will share with the newest.
        now: when it is saved.
    """
    readable = [entry for entry in entries if entry.manifest is not None]
    if not readable or readable[-1].manifest is None:
        return []
    newest = readable[-1]
    manifest = replace(
        readable[-1].manifest,
        created_at=now.isoformat(),
        step=None,
        metrics={},
        tags=(),
        pinned=False,
    )
    coming = Entry(path=newest.path, number=entries[-1].number + 1, manifest=manifest)
    linked = _linked_by(newest, held)
    takes = {**linked, "coming": max(0, needed_bytes - sum(linked.values()))}
    decisions = decide([*entries, coming], retention, {**held, coming.number: takes})
    return [d for d in decisions if not d.keep and d.entry.number not in (newest.number, coming.number)]


class Preflight:
    """Looks at the room in a store's place before each save. The save is tried whatever comes of it."""

    def __init__(self) -> None:
        self._warned = False

    def check(self, root: Root, needed_bytes: int, retention: Retention, of: Which = None) -> None:
        """Drop what the rules allow if the next checkpoint would not fit; warn if it still does not.

        Args:
            root: of the store.
            needed_bytes: what will be written if nothing of it can be linked.
            retention: the rules.
            of: which checkpoints they are about.
        """
        place = backend_of(root)
        free = place.free_bytes()
        if free is None or needed_bytes <= free:
            self._warned = False
            return
        entries, held = survey(root, of)
        now = dt.datetime.now(dt.UTC)
        for decision in to_make_room(entries, retention, held, needed_bytes=needed_bytes, now=now):
            try:
                dropped = drop(root, decision.entry)
            except StoreError as error:
                log.warning("no room could be made for the next checkpoint: %s", error)
                break
            free = place.free_bytes() or 0
            if dropped:
                log.info("deleted %s before the next save, which needs its room", decision.entry.path)
            if needed_bytes <= free:
                return
        linked = _linked_by(entries[-1], held) if entries else {}
        self._warn(root, needed_bytes - sum(linked.values()), free)

    def _warn(self, root: Root, needed_bytes: int, free: int) -> None:
        """Once, until there is room again."""
        if needed_bytes > free and not self._warned:
            log.warning(
                "the next checkpoint in %s needs about %d bytes, and %d are free; it is tried all the same. "
                "Free some space, or keep fewer checkpoints (keep_last, byte_budget)",
                root,
                needed_bytes,
                free,
            )
        self._warned = needed_bytes > free


def _linked_by(newest: Entry, held: Mapping[int, Held]) -> Held:
    """What the newest checkpoint shares with others, as the next one probably will."""
    others = {file for number, files in held.items() if number != newest.number for file in files}
    return {file: size for file, size in held.get(newest.number, {}).items() if file in others}
