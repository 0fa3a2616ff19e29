"""What a trial's own code is connected to the driver by, and where it runs."""

from __future__ import annotations

import os
from typing import Final, Protocol

from keepstep.tune.executors.protocol import Event, Job, Order

__all__ = ["WORKING_DIR", "Channel", "Place", "make_working_dir", "remove_if_empty"]

WORKING_DIR: Final = "working_dir"
"""Where in its directory a trial's code runs, so that relative names meet none of ours."""


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
    def working_dir(self) -> str:
        """The working directory of the job that was entered last."""

    @property
    def pid(self) -> int:
        """Of the process."""

    def enter(self, job: Job) -> None:
        """Be the place of this job, and no longer of another."""


def make_working_dir(directory: str) -> str:
    """The working directory in a trial's directory; what an earlier start left there is there again."""
    path = os.path.join(directory, WORKING_DIR)
    os.makedirs(path, exist_ok=True)
    return path


def remove_if_empty(path: str) -> bool:
    """Remove a working directory that nothing was written to; whether it was one."""
    try:
        os.rmdir(path)
    except OSError:  # it holds files, and they stay
        return False
    return True
