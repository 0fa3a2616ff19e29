"""How many checkpoints a run has saved, left out and waited for."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointCounts"]


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
