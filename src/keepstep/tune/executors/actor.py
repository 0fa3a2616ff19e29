"""The process of a trial on a cluster: calls come in, and each returns what there is to tell.

The trial's code runs in a thread of its own. A call ends when that waits for an order, or is over: so the
driver has to wait for one call of each trial, and nothing else connects the two.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import replace
from typing import Any, Final

from keepstep.tune.executors.process import Errand, Home, not_made
from keepstep.tune.executors.protocol import Ended, Event, Failed, Job, Order, Started
from keepstep.tune.executors.shipping import loads
from keepstep.tune.executors.wire import text_of
from keepstep.tune.executors.worker import run_job

__all__ = ["TrialActor"]

_SHOWS_WITHIN_S: Final = 5.0
"""How long a network file system may hide a directory that another machine made."""


class TrialActor:
    """Runs a trial, and those that follow it in this process.

    Args:
        node_ip: of this machine, for people.
    """

    def __init__(self, node_ip: str) -> None:
        self._node_ip = node_ip
        self._told: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._errands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._home = Home()
        self._temporary: list[str] = []

    # ------------------------------------------------------------------------------- called by the driver

    def begin(self, run: str, trainable: bytes, errand: bytes) -> tuple[list[bytes], bool]:
        """Run a job; returns as `go_on`.

        Args:
            run: the job's.
            trainable: the function or class, shipped.
            errand: an `Errand` with the job, shipped.
        """
        work = threading.Thread(target=self._work, args=(run, trainable), name="keepstep-trial", daemon=True)
        work.start()
        return self.go_on(errand)

    def go_on(self, errand: bytes | None) -> tuple[list[bytes], bool]:
        """Hand the trial an order, if there is one, and wait for what it has to tell.

        Returns:
            Events as `keepstep.tune.executors.wire` writes them, at least one unless all is over; whether
            it is.
        """
        if errand is not None:
            self._errands.put(errand)
        told: list[bytes] = []
        while True:
            event = self._told.get()
            if event is None:
                return told, True
            told.append(text_of(event))
            if not isinstance(event, Ended | Failed) and self._told.empty():
                return told, False

    # -------------------------------------------------------------------------------- the trial's thread

    def _work(self, run: str, trainable: bytes) -> None:
        try:
            errand: Errand = loads(self._errands.get())
            job, problem = errand.order, _hidden(errand.directory)
            assert isinstance(job, Job)
            self._settle(errand)
            loaded: Any = loads(trainable) if problem is None else None
        except BaseException as error:  # noqa: BLE001 - importing the user's modules may raise anything
            self._told.put(not_made(run, error))
        else:
            if problem is None:
                run_job(job, loaded, self, self._home)
                self._home.leave()
            else:
                self._told.put(Failed(run=run, error=problem))
        finally:
            for directory in self._temporary:
                shutil.rmtree(directory, ignore_errors=True)
            self._told.put(None)  # whatever happened: the driver waits for it

    def _settle(self, errand: Errand) -> None:
        """Know where a new job runs: in its directory, or in one that stands in for a place in a bucket."""
        if isinstance(errand.order, Job) or hasattr(errand.order, "job"):
            self._home.directory = errand.directory or tempfile.mkdtemp(prefix="keepstep-trial-")
            if not errand.directory:
                self._temporary.append(self._home.directory)

    def send(self, event: Event) -> None:
        """Tell the driver, when it asks next."""
        self._told.put(replace(event, node_ip=self._node_ip) if isinstance(event, Started) else event)

    def receive(self) -> Order:
        """Wait for the driver's order."""
        errand: Errand = loads(self._errands.get())
        self._settle(errand)
        assert not isinstance(errand.order, Job)
        return errand.order


def _hidden(directory: str) -> str | None:
    """Why a trial can't run here: the directory that the driver made for it is not seen; None: it is."""
    end = time.monotonic() + _SHOWS_WITHIN_S
    while directory and not os.path.isdir(directory):
        if time.monotonic() > end:
            return (
                f"{directory} is not there on {socket.gethostname()}, where the trial was to run. On a "
                "cluster, storage_path has to be what every machine sees: a directory of a shared file "
                'system, or a place in a bucket ("s3://bucket/runs")'
            )
        with contextlib.suppress(OSError):
            os.listdir(os.path.dirname(directory))  # has a network file system look again
        time.sleep(0.1)
    return None
