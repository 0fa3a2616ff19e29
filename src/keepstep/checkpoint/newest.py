"""The newest checkpoint of a store, from its place or its mirror; a damaged one is replaced from there."""

from __future__ import annotations

import contextlib
import logging
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

log = logging.getLogger(__name__)


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
        alone = self._world.size == 1
        if alone:
            self.pull()  # what came to one rank, others that ask at the same time would not see
        found = newest_whole(self._backend)
        if found is None and self._mirror is not None and not alone:
            log.warning(
                "%s holds no checkpoint, and on many ranks latest() does not look into the mirror %s: "
                "load_latest_into() does, called by all of them",
                self._backend,
                self._mirror.bucket,
            )
        return found

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
