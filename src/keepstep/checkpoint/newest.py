"""The newest checkpoint of a store, from its place or its mirror; a damaged one is replaced from there."""

from __future__ import annotations

import contextlib
from pathlib import Path

from keepstep.checkpoint.format.source import Place, place_exists
from keepstep.checkpoint.one_for_all import by_rank_0
from keepstep.checkpoint.parts import Parts
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.pulling import pull_if_newer
from keepstep.checkpoint.recovery import Restore, newest_whole, restore_newest
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import NoValidCheckpointError
from keepstep.files import Files
from keepstep.world import World

__all__ = ["Newest"]


class Newest:
    """Finds and restores the newest checkpoint of a store.

    Args:
        parts: of the store.
        files: how the disk is changed.
        world: the ranks that restore together.
    """

    def __init__(self, parts: Parts, files: Files, world: World) -> None:
        self._backend, self._upkeep, self._mirror = parts.backend, parts.upkeep, parts.mirror
        self._files = files
        self._world = world

    def whole(self) -> Checkpoint | None:
        """See `Store.latest`."""
        self.pull()
        return newest_whole(self._backend)

    def restore(self, load: Restore) -> Checkpoint | None:
        """See `Store.load_latest_with`."""
        if isinstance(self._backend, LocalBackend):
            by_rank_0(self._world, f"resuming {self._backend}", self.pull)  # the others have no mirror
        return restore_newest(self._backend, load, self._replace_damaged, self._world)

    def pull(self) -> Path | None:
        """Take the newest checkpoint from the mirror, if it is newer than all here."""
        if self._mirror is None or not isinstance(self._backend, LocalBackend):
            return None
        return pull_if_newer(self._mirror.bucket, self._backend, self._files)

    def _replace_damaged(self, place: Place, problem: str) -> bool:
        """Set a damaged checkpoint aside; whether the mirror's copy of it stands there now."""
        self._upkeep.set_aside(place, problem)
        if place_exists(place):
            return False
        with contextlib.suppress(NoValidCheckpointError):
            return self.pull() == place
        return False
