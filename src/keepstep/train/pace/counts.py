"""How many checkpoints a run has saved, left out and waited for."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

from keepstep.errors import RankFailedError, StateChangedError

__all__ = ["CheckpointCounts", "Complaints", "is_of_changed_state"]

_log = logging.getLogger(__name__)

_NUMBERS = re.compile(r"[0-9]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointCounts:
    """What has become of a run's checkpoints in this process.

    Attributes:
        saved: that many are committed.
        failed: that many were not, with an error that was raised or logged.
        skipped: times that one was due while another was being written, and was left out or put off.
        waited: times that one was due while another was being written, and the loop waited.
        waited_s: how long the loop waited for those, in seconds.
        redone: that many were made again, since tensors had changed while they were being copied.
    """

    saved: int = 0
    failed: int = 0
    skipped: int = 0
    waited: int = 0
    waited_s: float = 0.0
    redone: int = 0


class Complaints:
    """Failed saves that the training goes on after: told in full once, then only how many it were."""

    def __init__(self) -> None:
        self._reason = ""
        self._times = 0

    def failed(self, error: Exception) -> None:
        """Tell of a save that failed; for the same reason as before at the 2nd, 4th, 8th ... time only."""
        reason = _NUMBERS.sub("", str(error))  # each names another checkpoint
        self._times = self._times + 1 if reason == self._reason else 1
        self._reason = reason
        if self._times == 1:
            _log.error("A checkpoint was not saved; the training goes on as the policy says: %s", error)
        elif self._times.bit_count() == 1:
            _log.error("%d checkpoints in a row were not saved, for the same reason", self._times)

    def saved(self) -> None:
        """Tell that saves succeed again."""
        if self._times:
            _log.warning("Checkpoints are saved again.")
        self._reason, self._times = "", 0


def is_of_changed_state(error: Exception) -> bool:
    """Whether tensors were written to, on this rank or another, while they were copied."""
    cause = error.__cause__
    elsewhere = isinstance(cause, RankFailedError) and cause.kind == StateChangedError.__name__
    return elsewhere or isinstance(cause, StateChangedError)
