"""What a resumed script draws at random before it comes to where it was interrupted."""

from __future__ import annotations

import logging
from typing import Any

from keepstep.train import rng

__all__ = ["Draws"]

_log = logging.getLogger(__name__)


class Draws:
    """Tells of draws between the restoring of a checkpoint and the next batch of the pass it was made in.

    The run that was not interrupted has made none there, so all that is drawn later is shifted.
    """

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def note_restored(self) -> None:
        """The global generators were restored just now."""
        self._restored = rng.capture()

    def check(self, loader: int) -> None:
        """Warn if they have moved since; once, as loader number `loader` goes on."""
        if self._restored is None:
            return
        moved = rng.differing(self._restored, rng.capture())
        self._restored = None
        if moved:
            _log.warning(
                "The script has drawn at random (from %s) after the checkpoint was restored, before loader %d"
                " goes on. A run that is not interrupted draws nothing there, so what this one draws from "
                "now on differs; its batches don't. Draw it before resume(), or from a generator of its own.",
                " and ".join(moved),
                loader,
            )
