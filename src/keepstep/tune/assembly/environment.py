"""What the environment asks for, by Ray Tune's names."""

from __future__ import annotations

import logging
import os

__all__ = ["note_unneeded"]

_log = logging.getLogger(__name__)


def note_unneeded() -> None:
    """Say of variables that are set that nothing comes of them."""
    if os.environ.get("TUNE_GLOBAL_CHECKPOINT_S"):
        _log.warning(
            "TUNE_GLOBAL_CHECKPOINT_S is set, and not needed: every result and decision is written down when "
            "it happens"
        )
