"""What runs in one process: a trial, and those that follow it there; pure."""

from __future__ import annotations

from collections.abc import Callable

from keepstep.tune.executors.protocol import Ended, Event, Failed, Job, Started

__all__ = ["Course"]


class Course:
    """Puts what comes from a process into the order in which the driver is told.

    Args:
        job: the first.

    Attributes:
        job: the one that runs.
        next: what it was told to become.
        last: the event after which it has nothing more to say; told when the process is gone.
        killed: the run that the driver killed; "": none.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.next: Job | None = None
        self.last: Ended | Failed | None = None
        self.killed = ""

    def take(self, event: Event) -> list[Event]:
        """An event came: what the driver is to be told now."""
        if isinstance(event, Ended | Failed):
            self.last = event
            return []
        if isinstance(event, Started) and self.next is not None and event.run == self.next.run:
            told: list[Event] = [self.last] if self.last is not None else []
            self.job, self.next, self.last = self.next, None, None
            return [*told, event]
        return [event]

    def finish(self, failure: Callable[[str], Failed]) -> tuple[list[Event], Job | None]:
        """The process is gone: what the driver is to be told, and what has to be started anew.

        Args:
            failure: makes the failure of a run that was not over.
        """
        last: Event | None = self.last
        if last is None and self.next is not None and self.killed != self.job.run:
            last = Ended(run=self.job.run)  # it was to end: that it did not come back is nobody's loss
        last = last or failure(self.job.run)
        if self.next is not None and self.killed:
            return [last, failure(self.next.run)], None
        return [last], self.next
