"""The driver's end of one trial's process: what it sends and hears, what is told when it is over."""

from __future__ import annotations

import functools
import math
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from typing import Final

from keepstep.tune.executors.course import Course
from keepstep.tune.executors.kernel import signal_name
from keepstep.tune.executors.process import Errand
from keepstep.tune.executors.protocol import Event, Failed, Job, Next, Order
from keepstep.tune.executors.resources import Grant
from keepstep.tune.executors.servers import Server
from keepstep.tune.executors.shipping import dumps
from keepstep.tune.executors.wire import Frames, frame

__all__ = ["Run"]

_PIECE_BYTES: Final = 1 << 20
_FROM_OUTSIDE: Final = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
)


class Run(Course):
    """A trial's process, or that of several that follow each other in it.

    Args:
        job: the first.
        grant: what it holds.

    Attributes:
        first: the name of the first run; the server knows the process by it.
        deaf: nothing more comes.
        lingers_until: when it is killed if it is not gone.
    """

    def __init__(self, job: Job, grant: Grant) -> None:
        super().__init__(job)
        self.first = job.run
        self.grant = grant
        self.server: Server | None = None
        self.pid: int | None = None
        self.deaf = False
        self.lingers_until = math.inf
        self.connection, self.theirs = socket.socketpair()
        self.connection.setblocking(False)
        self._outbox = bytearray()
        self._frames = Frames()
        self._temporary: list[str] = []

    # ---------------------------------------------------------------------------------------- to the trial

    def send_job(self, order: Job | Next) -> None:
        """Have it run a job.

        Raises:
            UsageError: the configuration can't travel to another process.
        """
        job = order if isinstance(order, Job) else order.job
        data = dumps(Errand(order, self._directory(job)), f"The configuration of trial {job.trial_name}")
        self._outbox += frame(data)

    def send(self, order: Order) -> None:
        """Give an order that has no job in it."""
        self._outbox += _frame_of(order)

    def _directory(self, job: Job) -> str:
        if "://" not in job.path:
            return os.path.abspath(job.path)
        self._temporary.append(tempfile.mkdtemp(prefix="keepstep-trial-"))
        return self._temporary[-1]

    def flush(self) -> bool:
        """Send what there is room for; whether all of it went."""
        try:
            while self._outbox:
                del self._outbox[: self.connection.send(self._outbox[:_PIECE_BYTES])]
        except BlockingIOError:
            return False
        except OSError:
            self._outbox.clear()  # it is dead, and its server will say so
        return True

    # -------------------------------------------------------------------------------------- from the trial

    def hear(self) -> Iterator[bytes]:
        """The frames that came."""
        while not self.deaf:
            try:
                data = self.connection.recv(_PIECE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.deaf = True
            yield from self._frames.feed(data)

    # -------------------------------------------------------------------------------------------- the end

    def end(self, status: int | None, why: str | None) -> tuple[list[Event], Job | None]:
        """It is gone: what the driver is to be told, and what was to follow and has to be started anew.

        Args:
            status: the exit code of the process, minus the signal's number if one killed it; None: unknown.
            why: how it ended, if that is known better.
        """
        return self.finish(lambda run: self._failure(run, status, why))

    def _failure(self, run: str, status: int | None, why: str | None) -> Failed:
        if self.killed:
            return Failed(run=run, error="killed by the driver", killed=True)
        if why is not None or status is None:
            return Failed(run=run, error=why or "its process is gone", killed=True)
        if status >= 0:
            said = f"its process ended with exit status {status} before the trial was over"
            return Failed(run=run, error=said)
        outside = -status in _FROM_OUTSIDE
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        how = f"{'killed by' if outside else 'crashed with'} {signal_name(-status)}{hint}"
        return Failed(run=run, error=how, killed=outside)

    def close(self) -> None:
        """Free what it holds here."""
        self.connection.close()
        self.theirs.close()
        for directory in self._temporary:
            shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def _frame_of(order: Order) -> bytes:
    """There are few orders without a job, and each report is answered with one."""
    return frame(dumps(Errand(order), "An order"))
