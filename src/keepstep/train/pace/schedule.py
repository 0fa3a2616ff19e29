"""When a checkpoint is due: a decision from the policy, the step, the clock and what saves cost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from keepstep.train.pace.frequency import Spacing
from keepstep.train.settings.config import CheckpointPolicy

__all__ = ["Due", "LastSave", "is_due"]


class Due(Enum):
    """What to do at this step."""

    NO = "no checkpoint is due"
    YES = "save now, and wait for the one that is being written if there is one"
    SKIPPED = "one is due, but another is being written and the policy doesn't wait"


@dataclass(frozen=True, kw_only=True)
class LastSave:
    """What is known of the last checkpoint.

    Attributes:
        step: optimizer steps done when it was made; 0 if there is none.
        at_s: clock when the training loop went on, in seconds; the start of the run if there is none.
    """

    step: int
    at_s: float


def is_due(
    policy: CheckpointPolicy, spacing: Spacing, *, step: int, now_s: float, last: LastSave, busy: bool
) -> Due:
    """Decide whether to save now.

    Steps are counted from the start of training, so a run that resumed saves at the same steps as one that
    was never interrupted. By default a checkpoint that falls due by steps waits for one that is still being
    written; one that falls due by time can come a little later instead.

    Args:
        policy: what the user wants.
        spacing: what follows from it and from what saves cost.
        step: optimizer steps done.
        now_s: clock, in seconds.
        last: the last checkpoint.
        busy: it is still being written.
    """
    since_s = now_s - last.at_s
    if step <= last.step or since_s < spacing.least_s:
        return Due.NO
    interval = policy.every_n_steps
    by_steps = interval is not None and step // interval > last.step // interval
    by_time = spacing.wanted_s is not None and since_s >= spacing.wanted_s
    if not (by_steps or by_time):
        return Due.NO
    waits = policy.when_busy == "wait" or (policy.when_busy is None and by_steps)
    if waits or not busy:
        return Due.YES
    prescribed = by_steps or bool(spacing.wanted_s)  # where cost alone decides, a busy writer is no surprise
    return Due.SKIPPED if prescribed else Due.NO
