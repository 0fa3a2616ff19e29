"""Frequency at work: times steps and saves, decides when one is due, counts, and says what was chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from keepstep.checkpoint.pending import PendingSave
from keepstep.train.pace.counts import CheckpointCounts
from keepstep.train.pace.frequency import CostMeter, Spacing, space
from keepstep.train.pace.schedule import Due, LastSave, is_due
from keepstep.train.settings.config import CheckpointPolicy

__all__ = ["Pacer"]

_log = logging.getLogger(__name__)

_QUIET_S = 60.0


class Pacer:
    """Stands at the entrance and the exit of `checkpoint()`.

    Args:
        policy: what the user wants.
        waited_s: how long steps have waited for copies so far, in seconds; only grows.
        clock: seconds that only grow.
    """

    def __init__(
        self, policy: CheckpointPolicy, *, waited_s: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self.clock = clock
        self._policy = policy
        self._waited_s = waited_s
        self._meter = CostMeter()
        self._counts = CheckpointCounts()
        self._under_way: list[tuple[PendingSave, int]] = []
        self._last = LastSave(step=0, at_s=clock())
        self._safe_step = 0
        self._told: Spacing | None = None
        self._told_at_s = -math.inf
        self._putting_off = False
        self._step: int | None = None
        self._left_s = clock()
        self._waited_before_s = 0.0
        self._was_busy = False

    # -- at checkpoint() --------------------------------------------------------------------------------

    def ask(self, step: int, *, busy: bool) -> Due:
        """Decide at the entrance; `leave` or `began` follows.

        Args:
            step: optimizer steps done.
            busy: a save is being written.
        """
        now_s = self.clock()
        if self._step is not None and step > self._step:
            waited_s = self._waited_s() - self._waited_before_s
            self._meter.step(now_s - self._left_s, waited_s=waited_s, busy=self._was_busy)
        spacing = self.spacing
        due = is_due(self._policy, spacing, step=step, now_s=now_s, last=self._last, busy=busy)
        if due is Due.SKIPPED and not self._putting_off:
            self._putting_off = True
            self._counts = replace(self._counts, skipped=self._counts.skipped + 1)
        self._tell(spacing, now_s)
        self._step = step
        return due

    def leave(self, *, busy: bool) -> None:
        """The loop goes on."""
        self._left_s, self._was_busy = self.clock(), busy
        self._waited_before_s = self._waited_s()

    def began(self, step: int, entered_s: float, pending: PendingSave | None, *, behind: bool) -> None:
        """A save has begun, or could not; the loop goes on.

        Args:
            step: optimizer steps done.
            entered_s: clock when `checkpoint()` was called.
            pending: the save; None if it could not be begun.
            behind: it had to wait until an earlier one was written.
        """
        blocked_s = self.clock() - entered_s
        if behind:
            for_others_s = max(0.0, blocked_s - (pending.blocked_s if pending is not None else 0.0))
            counts = self._counts
            self._counts = replace(counts, waited=counts.waited + 1, waited_s=counts.waited_s + for_others_s)
        if pending is not None:
            self._meter.save(blocked_s)
            self._under_way.append((pending, step))
        else:
            self._counts = replace(self._counts, failed=self._counts.failed + 1)
        self._putting_off = False
        self._last = LastSave(step=step, at_s=self.clock())
        self.leave(busy=pending is not None)

    # -- elsewhere --------------------------------------------------------------------------------------

    @property
    def safe_step(self) -> int:
        """The step of the last checkpoint, written or on its way; 0 if there is none."""
        self._look()
        return max([self._safe_step, *(step for _, step in self._under_way)])

    def safe_up_to(self, step: int) -> None:
        """The run is safe up to this step as of now: it was saved by hand, or restored.

        Earlier saves of later steps hold what the run went back from: they make none of its steps safe.
        """
        self._look()
        self._under_way = [(pending, min(begun_at, step)) for pending, begun_at in self._under_way]
        self._last = LastSave(step=step, at_s=self.clock())
        self._safe_step = step
        self._step = None  # what went on until now was no step

    def saved_by_hand(self, step: int) -> None:
        """A save that the loop waited for is committed, here or elsewhere."""
        counts = self.counts
        self._counts = replace(counts, saved=counts.saved + 1)
        self._safe_step = max(self._safe_step, step)
        self._step = None

    def redone(self) -> None:
        """A save failed since tensors had changed, and is made again."""
        counts = self.counts  # with the one that failed
        self._counts = replace(counts, failed=counts.failed - 1, redone=counts.redone + 1)

    @property
    def spacing(self) -> Spacing:
        """How far apart saves are to be, as of now."""
        return space(self._policy, self._meter.cost(), self._meter.step_s)

    def quiet_steps(self) -> int:
        """For how many steps from now on certainly no checkpoint is due; 1 if that can't be said."""
        spacing, step_s = self.spacing, self._meter.step_s
        earliest_s = max(spacing.least_s, spacing.wanted_s or 0.0)
        left_s = earliest_s - (self.clock() - self._last.at_s)
        if self._policy.every_n_steps is not None or not step_s or left_s <= 0:
            return 1
        return max(1, min(1000, int(left_s / step_s / 2)))

    @property
    def counts(self) -> CheckpointCounts:
        """What has become of checkpoints so far."""
        self._look()
        return self._counts

    def _look(self) -> None:
        """See what became of saves that were on their way."""
        under_way, self._under_way = self._under_way, []
        for pending, step in under_way:
            counts = self._counts
            if not pending.done():
                self._under_way.append((pending, step))
            elif pending.failed:
                self._counts = replace(counts, failed=counts.failed + 1)
            else:
                self._counts = replace(counts, saved=counts.saved + 1)
                self._safe_step = max(self._safe_step, step)

    def to_json(self) -> dict[str, Any]:
        """For a manifest: what was chosen, and the counts before the checkpoint that it belongs to."""
        counts = asdict(self.counts)
        return {**self.spacing.to_json(), "counts": {**counts, "waited_s": round(counts["waited_s"], 6)}}

    def _tell(self, spacing: Spacing, now_s: float) -> None:
        if spacing.cost is None or spacing.cost.is_bound or now_s - self._told_at_s < _QUIET_S:
            return
        if spacing.differs_from(self._told):
            _log.info("checkpoints by %s", spacing)
            self._told, self._told_at_s = spacing, now_s
