"""Why an experiment ends before everything is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, Literal

from keepstep.tune.driver.interrupts import Interrupts
from keepstep.tune.experiment.history import History
from keepstep.tune.stopper import Stopper

__all__ = ["Halt", "Reason"]

Reason = Literal["time", "stop", "failed", "interrupted"]

_MESSAGES: Final[Mapping[Reason, str]] = {
    "time": "time_budget_s is over: running trials report once more, save and end",
    "stop": "a stopper ends the experiment: running trials report once more, save and end",
    "failed": "a trial failed, and fail_fast is set: running trials report once more, save and stop",
    "interrupted": "interrupted: running trials report once more, save and stop; interrupt again to stop at "
    "once. Start the script again, or use Tuner.restore, to go on from there",
}


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
        self._told: Reason | None = None
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

    def message(self) -> str | None:
        """What people should be told of the reason; None: they know already."""
        if self.reason == self._told:
            return None
        self._told = self.reason
        return _MESSAGES[self.reason] if self.reason is not None else None

    def overdue(self, now: float, grace_s: float) -> bool:
        """Whether trials that have not reported since should be ended where they are.

        Who interrupts wants everything saved, and does so again when that takes too long.
        """
        return self.reason not in (None, "interrupted") and now - self._since_s > grace_s
