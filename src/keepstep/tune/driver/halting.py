"""Why an experiment ends before everything is done."""

from __future__ import annotations

import time
from typing import Literal

from keepstep.tune.driver.interrupts import Interrupts
from keepstep.tune.experiment.history import History
from keepstep.tune.stopper import Stopper

__all__ = ["Halt", "Reason"]

Reason = Literal["time", "stop", "failed", "interrupted"]


class Halt:
    """Notes the first reason to end.

    Args:
        interrupts: signals.
        time_budget_s: seconds of the experiment, over all restarts; None: no end.
    """

    def __init__(self, interrupts: Interrupts, time_budget_s: float | None) -> None:
        self._interrupts = interrupts
        self._budget_s = time_budget_s
        self.reason: Reason | None = None
        self._since_s = 0.0

    def because(self, reason: Reason) -> None:
        """End for this reason, if there is none yet."""
        if self.reason is None:
            self.reason = reason
            self._since_s = time.monotonic()

    def look(self, history: History, stopper: Stopper) -> None:
        """See whether there is a reason now."""
        if self._interrupts.noted is not None:
            self.because("interrupted")
        elif self._budget_s is not None and history.elapsed_s(time.time()) >= self._budget_s:
            self.because("time")
        elif stopper.stop_all():
            self.because("stop")

    def overdue(self, now: float, grace_s: float) -> bool:
        """Whether trials that have not reported since should be ended where they are.

        Who interrupts wants everything saved, and does so again when that takes too long.
        """
        return self.reason not in (None, "interrupted") and now - self._since_s > grace_s
