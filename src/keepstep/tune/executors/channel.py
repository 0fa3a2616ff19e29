"""What a trial's own code is connected to the driver by, and where it runs."""

from __future__ import annotations

from typing import Protocol

from keepstep.tune.executors.protocol import Event, Job, Order

__all__ = ["Channel", "Place"]


class Channel(Protocol):
    """Carries events to the driver, and its orders back."""

    def send(self, event: Event) -> None:
        """Tell the driver."""

    def receive(self) -> Order:
        """Wait for its order.

        Raises:
            TrialStopped: nothing of this process is to go on.
        """


class Place(Protocol):
    """Where a trial's code runs: its directory, its environment, its output."""

    @property
    def trial_dir(self) -> str:
        """The working directory of the job that was entered last."""

    @property
    def pid(self) -> int:
        """Of the process."""

    def enter(self, job: Job) -> None:
        """Be the place of this job, and no longer of another."""
