"""What a resumed script draws at random before it comes to where it was interrupted."""

from __future__ import annotations

import logging
from typing import Any

from keepstep.train import rng

__all__ = ["Draws"]

_log = logging.getLogger(__name__)


class Draws:
    """Tells of draws between the restoring of a checkpoint and the epoch, or the batch, that comes after it.

    The run that was not interrupted has made none there, so all that is drawn later is shifted.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def note_restored(self) -> None:
        """The global generators were restored just now."""
        self._restored = rng.capture()

    def forget(self) -> None:
        """Where the checkpoint was made is passed: what is drawn from now on is drawn in every run."""
        self._restored = None

    def check(self, where: str) -> None:
        """Warn if they have moved since; once.

        Args:
            where: it is noticed.
        """
        if self._restored is None:
            return
        moved = rng.differing(self._restored, rng.capture())
        if moved:
            self._restored = None
            _log.warning(
                "The script has drawn at random (from %s) after the checkpoint was restored, before %s. "
                "A run that is not interrupted draws nothing there, so what this one draws from now on is "
                "something else; its batches are the same. Draw it before resume(), or from a generator of "
                "its own.",
                " and ".join(moved),
                where,
            )
