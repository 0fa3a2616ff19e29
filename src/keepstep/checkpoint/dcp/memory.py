"""What this process remembers of the last checkpoint in a directory, for the next one to link to.

A DCP program may make a writer for each checkpoint, or one for all. Checkpoints that lie side by side are one
after another either way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from keepstep.checkpoint.dcp.spots import Spot
from keepstep.checkpoint.format.manifest import FileEntry, Manifest, TensorEntry
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.saving.rank_planner import RankPlanner

__all__ = ["Memory", "follow", "give_back", "take"]

_MOST_PLACES: Final = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Written:
    """A share that was written, and may have been committed since."""

    save: str
    checkpoint: str
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]


class Memory:
    """Of one process, about one directory; used by one save at a time.

    DCP tells only the coordinator that a checkpoint was committed: the others hear it with the next save.

    Args:
        size: how many ranks save.

    Attributes:
        size: how many ranks save.
        ranks: plans the saves, on the coordinator; its `share` is what this rank may link to.
        last: the save that the coordinator committed last; empty on other ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.ranks = RankPlanner(size)
        self.last = ""
        self._linked_to = ""
        self._written: _Written | None = None

    def wrote(
        self, save: str, checkpoint: str, files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
    ) -> None:
        """This rank's share of a save is written.

        Args:
            save: which one; the same on all ranks.
            checkpoint: the name that it will have.
            files: of the share.
            tensors: in them, by the addresses that they have in plans.
        """
        self._written = _Written(save=save, checkpoint=checkpoint, files=files, tensors=tensors)

    def settle(self, last: str) -> None:
        """Link to the save that was committed last, if this rank wrote its share of it, and to no other."""
        written, self._written = self._written, None
        if written is not None and written.save == last:
            self.ranks.share.remember(written.checkpoint, written.files, written.tensors)
            self._linked_to = last
        elif last != self._linked_to:
            self.ranks.share.forget()
            self._linked_to = ""

    def adopt(self, checkpoint: str, manifest: Manifest, tensors: Mapping[str, TensorEntry]) -> None:
        """Go on from a checkpoint that was loaded and verified."""
        self.ranks.adopt(checkpoint, manifest, tensors)
        self.last = self._linked_to = manifest.id
        self._written = None


_kept: dict[str, Memory] = {}
_guard = threading.RLock()  # a handler of a signal may save in the middle of this


def take(spot: Spot, size: int) -> Memory:
    """What is known about the directory of a checkpoint; nobody else has it until it is given back.

    In a bucket nothing is linked: a link there is the name of another checkpoint's object, and only a store
    sees to it that this one stays.
    """
    with _guard:
        found = None if spot.in_bucket else _kept.pop(spot.parent, None)
    return found if found is not None and found.size == size else Memory(size)


def give_back(spot: Spot, memory: Memory) -> None:
    """Keep it for the next save there; of many directories the last few are kept."""
    with _guard:
        _kept.pop(spot.parent, None)
        _kept[spot.parent] = memory
        while len(_kept) > _MOST_PLACES:
            del _kept[next(iter(_kept))]


def follow(place: Place, manifest: Manifest, tensors: Mapping[str, TensorEntry]) -> None:
    """Go on from a checkpoint that this process has loaded and verified, if as many ranks save again."""
    size = manifest.environment.get("world_size")
    if isinstance(place, Path) and isinstance(size, int):
        spot = Spot.of(place, None)
        memory = take(spot, size)
        memory.adopt(spot.name, manifest, tensors)
        give_back(spot, memory)


def _start_anew_after_fork() -> None:
    """A child has none of its parent's threads, and other memory than what was watched."""
    global _kept, _guard
    _kept, _guard = {}, threading.RLock()


os.register_at_fork(after_in_child=_start_anew_after_fork)
