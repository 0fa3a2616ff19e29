"""When a checkpoint is due: a decision from the policy, the step, the clock and what the last save cost."""

from __future__ import annotations

from dataclasses import dataclass

from keepstep.train.config import CheckpointPolicy

__all__ = ["LastSave", "is_due"]


@dataclass(frozen=True, kw_only=True)
class LastSave:
    """What is known of the last checkpoint.

    Attributes:
        step: optimizer steps done when it was made; 0 if there is none.
        at_s: clock when the training loop went on, in seconds; the start of the run if there is none.
        blocked_s: how long the training loop was blocked by it; 0 if none was measured.
    """

    step: int
    at_s: float
    blocked_s: float = 0.0


def is_due(policy: CheckpointPolicy, *, step: int, now_s: float, last: LastSave, busy: bool) -> bool:
    """Decide whether to save now.

    Steps are counted from the start of training, so a run that resumed saves at the same steps as one that
    was never interrupted. A checkpoint that falls due by steps waits for one that is still being written;
    one that falls due by time can come a little later instead.

    Args:
        policy: what the user wants.
        step: optimizer steps done.
        now_s: clock, in seconds.
        last: the last checkpoint.
        busy: it is still being written.
    """
    if step <= last.step:
        return False
    since_s = now_s - last.at_s
    # Blocked for b seconds, then free for f: the share b / (b + f) stays below the limit m if f >= b / m - b.
    share = policy.max_overhead
    if share is not None and since_s < last.blocked_s / share - last.blocked_s:
        return False
    interval = policy.every_n_steps
    if interval is not None and step // interval > last.step // interval:
        return True
    if busy:
        return False
    if policy.every_s is not None:
        return since_s >= policy.every_s
    return interval is None
