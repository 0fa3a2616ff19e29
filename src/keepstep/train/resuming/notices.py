"""What is told once, on the main process, about a store that a run saves into."""

from __future__ import annotations

import logging

from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.world import World

__all__ = ["Notices"]

_log = logging.getLogger(__name__)

_MANY = 10
"""Automatic checkpoints of one process after which it is told that all of them stay."""


class Notices:
    """Says each thing once.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._is_main = world.rank == 0
        self._looked_for_others = False
        self._told_of_all = False

    def before_save(self, store: Store, *, saved: int) -> None:
        """Look at the store that is about to be saved into.

        Args:
            store: of the project.
            saved: automatic checkpoints that this process has made.
        """
        if self._is_main and not self._looked_for_others:
            self._looked_for_others = True
            self._look_for_other_runs(store)
        if self._is_main and not self._told_of_all and saved >= _MANY:
            self._told_of_all = True
            if store.retention == Retention():
                _log.warning(
                    "%s keeps every checkpoint, %d of this run by now, until the disk is full: the "
                    "CheckpointPolicy names none to keep. Give it keep_last=3, say; keep_every_n_steps=1 "
                    "keeps all of them without this message",
                    store.address,
                    saved,
                )

    def resumed(self, store: Store, loaded: Checkpoint | None) -> None:
        """Say where the run begins."""
        if not self._is_main:
            return
        if loaded is None:
            _log.info("%s holds no checkpoint yet: the run begins from the start", store.address)
            return
        said = loaded.manifest
        _log.info(
            "going on after %s: step %s, epoch %s, saved %s",
            loaded.place,
            said.step,
            said.epoch,
            said.created_at,
        )

    def ended(self, unsaved_steps: int) -> None:
        """Say that so many optimizer steps are in no checkpoint."""
        if self._is_main and unsaved_steps > 0:
            _log.warning(
                "The run ends %d optimizer steps after its last checkpoint, which are not saved. Call "
                "end_training(finished=True) if they count.",
                unsaved_steps,
            )

    def _look_for_other_runs(self, store: Store) -> None:
        """A forgotten resume() is a run that begins anew beside the one it was meant to go on with."""
        others = [entry for entry in store.list() if entry.manifest.run != store.run]
        if others:
            _log.warning(
                "%s holds checkpoints of another run, up to step %s, and this run begins beside them, as "
                "resume() was not called. Call it to go on with that run, or choose another project_dir. The "
                "other checkpoints are kept, whatever the policy says",
                store.address,
                others[-1].step,
            )
