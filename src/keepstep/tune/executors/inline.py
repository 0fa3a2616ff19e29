"""Trials in this process, one at a time: for debugging, and for runs that have to come out the same.

Each trial runs in a thread of its own, but only the one that holds the baton runs; `wait` hands it to each
trial in turn. In its turn a trial has its own current directory, environment and global random generators;
these start from its id, so that what it draws does not depend on others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from keepstep.tune.executors.channel import make_working_dir, remove_if_empty
from keepstep.tune.executors.environment import changes_directory, put, visible_gpus
from keepstep.tune.executors.generators import Generators
from keepstep.tune.executors.machine import machine_total
from keepstep.tune.executors.protocol import (
    Ended,
    Event,
    Failed,
    Job,
    Next,
    Order,
    Resources,
    Started,
)
from keepstep.tune.executors.resources import Grant, Pool, PooledExecutor
from keepstep.tune.executors.worker import run_job
from keepstep.tune.trainable.session import Session, TrialStopped, current, enter

__all__ = ["InlineExecutor"]


class InlineExecutor(PooledExecutor):
    """An `Executor` that runs trials in threads of this process, which take turns.

    What trials print goes where the driver's output goes, so that a debugger works in them.

    Args:
        trainable: the function or class that trials run.
        total: what there is in all; None: what this machine has.
    """

    def __init__(self, trainable: Any, *, total: Resources | None = None) -> None:
        super().__init__(Pool(machine_total(visible_gpus())[0] if total is None else total))
        self._trainable = trainable
        self._generators = Generators()
        self._runs: dict[str, _Run] = {}
        self._ready: deque[_Run] = deque()
        self._idle: list[_Thread] = []
        self._events: list[Event] = []

    def launch(self, job: Job) -> None:
        run = _Run(job, self._pool.take(job.resources))
        self._runs[job.run] = run
        self._ready.append(run)

    def order(self, run: str, order: Order) -> None:
        found = self._runs.get(run)
        if found is None or not found.waits or found.job.run != run:
            return
        if isinstance(order, Next):
            found.next = order.job
            self._runs[order.job.run] = found
        found.waits, found.order = False, order
        self._ready.append(found)

    def kill(self, run: str) -> None:
        found = self._runs.get(run)
        if found is None:
            return
        found.killed, found.waits = run, False
        if found not in self._ready:
            self._ready.append(found)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        for _ in range(len(self._ready)):
            self._turn(self._ready.popleft())
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        for run in list(self._runs.values()):
            self.kill(run.job.run)
        self.wait(0)
        for thread in self._idle:
            thread.end()
        self._idle.clear()
        self._events.clear()
        self._generators.close()

    # ------------------------------------------------------------------------------------------ turns

    def _turn(self, run: _Run) -> None:
        """Hand the baton to a run, until it waits for an order or is over."""
        if run.thread is None and run.killed:
            self._over(run)
            return
        if run.thread is None:
            run.thread = self._idle.pop() if self._idle else _Thread()
            run.thread.work = (run, self._trainable)
        job = run.job
        self._generators.give_to(job.run, zlib.crc32(f"{job.trial_id}/{job.iteration}".encode()))
        run.go_on()
        if run.job is not job:  # it goes on as another trial
            del self._runs[job.run]
            self._generators.forget(job.run)
        if run.done:
            self._idle.append(run.thread)
            self._over(run)
        else:
            self._events += run.take_told()
            run.waits = True

    def _over(self, run: _Run) -> None:
        told = run.take_told()
        if run.killed:
            last = Ended(run=run.job.run) if run.killed != run.job.run else killed(run.job.run)
            told = [*(event for event in told if not isinstance(event, Ended | Failed)), last]
            told += [killed(run.next.run)] if run.next is not None else []
        self._events += told
        for name in {run.job.run, run.next.run if run.next is not None else run.job.run}:
            del self._runs[name]
        self._generators.forget(run.job.run)
        self._pool.give_back(run.grant)
        run.clear()
        if run.next is not None and not run.killed:
            self.launch(run.next)


def killed(run: str) -> Failed:
    """A run that the driver killed."""
    return Failed(run=run, error="killed by the driver", killed=True)


class _Run:
    """One run: its thread's channel to the driver, and its place."""

    def __init__(self, job: Job, grant: Grant) -> None:
        self.job = job
        self.grant = grant
        self.thread: _Thread | None = None
        self.order: Order | None = None
        self.next: Job | None = None
        self.waits = False
        self.killed = ""
        self.done = False
        self._told: list[Event] = []
        self._session: Session | None = None
        self._working_dirs: list[str] = []
        self._temporary: list[str] = []
        self._undo: Mapping[str, str | None] = {}

    # ------------------------------------------------------------------------ called by the driver's thread

    def go_on(self) -> None:
        """Let the thread run until it waits again."""
        assert self.thread is not None
        here = os.getcwd()
        enter(self._session)
        self._wear(self.job.env)
        try:
            if self._working_dirs and changes_directory():
                with contextlib.suppress(FileNotFoundError):  # it was deleted
                    os.chdir(self.working_dir)
            self.thread.run_until_it_waits()
        finally:
            self._session = current()
            enter(None)
            self._wear({})
            os.chdir(here)

    def take_told(self) -> list[Event]:
        """What it told since the last time."""
        told, self._told = self._told, []
        return told

    def clear(self) -> None:
        """Remove what was only for the run."""
        for directory in self._working_dirs:
            remove_if_empty(directory)
        for directory in self._temporary:
            shutil.rmtree(directory, ignore_errors=True)

    # ----------------------------------------------------------------------------- called by the run's thread

    @property
    def working_dir(self) -> str:
        """The directory in which it runs."""
        return self._working_dirs[-1]

    @property
    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def enter(self, job: Job) -> None:
        """Be the place of this job."""
        self._wear(job.env)
        if "://" in job.path:
            directory = tempfile.mkdtemp(prefix="keepstep-trial-")
            self._temporary.append(directory)
        else:
            directory = os.path.abspath(job.path)
        self._working_dirs.append(make_working_dir(directory))
        if changes_directory():
            os.chdir(self.working_dir)

    def _wear(self, env: Mapping[str, str]) -> None:
        if env or self._undo:
            put(self._undo)
            self._undo = put(env)

    def send(self, event: Event) -> None:
        """Keep it for the driver."""
        self._told.append(event)
        if isinstance(event, Started) and self.next is not None and event.run == self.next.run:
            self.job, self.next = self.next, None

    def receive(self) -> Order:
        """Give the baton back, and wait for it and the order."""
        assert self.thread is not None
        self.thread.wait()
        order, self.order = self.order, None
        if self.killed or order is None:
            raise TrialStopped
        return order


class _Thread:
    """A thread that runs only while the driver's thread waits for it; used for run after run."""

    def __init__(self) -> None:
        self.work: tuple[_Run, Any] | None = None
        self._turn = threading.Lock()
        self._back = threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._lost = False
        threading.Thread(target=self._loop, name="keepstep-trial", daemon=True).start()

    def run_until_it_waits(self) -> None:
        """Hand it the baton, and take it back."""
        if self._lost:
            return
        self._lost = True  # unless the baton comes back: Ctrl-C may end the waiting
        self._turn.release()
        self._back.acquire()
        self._lost = False

    def wait(self) -> None:
        """Give the baton back, and wait for it; called in the thread."""
        self._back.release()
        self._turn.acquire()

    def end(self) -> None:
        """Let the thread end."""
        self.work = None
        self._turn.release()

    def _loop(self) -> None:
        self._turn.acquire()
        while self.work is not None:
            run, trainable = self.work
            job = run.job
            run_job(replace(job, config=fresh(job.config)), trainable, run, run)
            run.done = True
            self.wait()


def fresh(config: Any) -> Any:
    """A copy of nested dicts and lists, so that a trial can change its configuration."""
    if type(config) is dict:
        return {name: fresh(value) for name, value in config.items()}
    return [fresh(value) for value in config] if type(config) is list else config
