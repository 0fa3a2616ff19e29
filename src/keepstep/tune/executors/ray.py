"""Trials on a Ray cluster: each start of a trial is an actor, which Ray places where there is room."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from keepstep.errors import UsageError
from keepstep.tune.executors.actor import TrialActor
from keepstep.tune.executors.course import Course
from keepstep.tune.executors.process import Errand
from keepstep.tune.executors.protocol import (
    Event,
    Failed,
    Job,
    Next,
    Order,
    Reported,
    Resources,
    Saved,
    Started,
    Stop,
)
from keepstep.tune.executors.resources import Grant, Pool, PooledExecutor
from keepstep.tune.executors.shipping import dumps
from keepstep.tune.executors.wire import event_of

__all__ = ["RayExecutor"]

_MOST_UNSTARTED: Final = 32
"""How many trials may wait for Ray to find room for them, or start, at a time."""
_LINGER_S: Final = 30.0
"""How long an actor may take to end once its trial is over."""
_LOOK_AGAIN_S: Final = 5.0
"""How often it is asked what the cluster has."""
_NAMES: Final = {"CPU": "cpu", "GPU": "gpu"}
_ARGUMENTS: Final = {"cpu": "num_cpus", "gpu": "num_gpus", "memory": "memory"}


class _Actor(TrialActor):
    def __init__(self) -> None:
        super().__init__(ray.util.get_node_ip_address())


class _Run(Course):
    """An actor.

    Args:
        job: the first that it runs.
        grant: what it holds.
        actor: its handle.

    Attributes:
        call: what it was called for last, and has not come back; None: it waits for an order.
        started: whether the trial's code was reached.
    """

    def __init__(self, job: Job, grant: Grant, actor: Any) -> None:
        super().__init__(job)
        self.grant = grant
        self.actor = actor
        self.call: Any = None
        self.started = False
        self.node_ip = ""


class RayExecutor(PooledExecutor):
    """An `Executor` that runs each trial in an actor of a Ray cluster.

    Ray is used as it was initialized; if it was not: the cluster at `address`, that of RAY_ADDRESS, one that
    `ray start` started on this machine, or else one of this machine alone, which ends with the experiment.

    Args:
        trainable: the function or class that trials run.
        total: what trials may hold in all, as {"cpu": 64, "gpu": 8}; None: what the cluster has. To be said
            of a cluster that grows when it is asked for more than it has.
        address: of the cluster, as `ray.init` takes it.

    Raises:
        UsageError: the trainable can't travel to another process.
        ConnectionError: there is no cluster at that address.
    """

    def __init__(self, trainable: Any, *, total: Resources | None = None, address: str | None = None) -> None:
        super().__init__(Pool(total or {}))
        data = dumps(trainable, "The trainable")
        self._ours = not ray.is_initialized()
        if self._ours:
            _connect(address)
        self._trainable = ray.put(data)
        self._kind: Any = ray.remote(_Actor)
        self._fixed = total is not None
        self._looked_s = -_LOOK_AGAIN_S
        self._largest: list[dict[str, float]] = []
        self._runs: dict[str, _Run] = {}
        self._leaving: list[tuple[float, Any]] = []
        self._events: list[Event] = []

    @property
    def total(self) -> Resources:
        self._look()
        return super().total

    def fits(self, resources: Resources) -> bool:
        self._look()
        unstarted = sum(not run.started for run in set(self._runs.values()))
        return unstarted < _MOST_UNSTARTED and super().fits(resources)

    def why_never(self, resources: Resources) -> str | None:
        self._look()
        problem = super().why_never(resources)
        if problem is not None or self._fixed or any(_holds(node, resources) for node in self._largest):
            return problem
        return (  # an actor runs on one machine
            f"it asks for {dict(resources)}, and no single machine of the cluster has all of it: "
            f"{self._largest}. A trial runs on one machine: ask for less with "
            "tune.with_resources(trainable, {...})"
        )

    def _look(self) -> None:
        """See what the cluster has; machines that are gone count on, as others may come in their place."""
        now = time.monotonic()
        if self._fixed or now - self._looked_s < _LOOK_AGAIN_S:
            return
        self._looked_s = now
        nodes = [_ours(node["Resources"]) for node in ray.nodes() if node["Alive"]]
        self._largest += [node for node in nodes if node not in self._largest]
        names = {name for node in nodes for name in node}
        self._pool.grow({name: sum(node.get(name, 0.0) for node in nodes) for name in names})

    # -------------------------------------------------------------------------------------------- trials

    def launch(self, job: Job) -> None:
        grant = self._pool.take(job.resources)
        directory = "" if "://" in job.path else os.path.abspath(job.path)
        try:
            errand = dumps(Errand(job, directory), f"The configuration of trial {job.trial_name}")
            if directory:
                os.makedirs(directory, exist_ok=True)
            actor = self._kind.options(**_options(job)).remote()
        except (UsageError, OSError, ValueError) as error:
            self._pool.give_back(grant)
            self._events.append(Failed(run=job.run, error=str(error)))
            return
        run = self._runs[job.run] = _Run(job, grant, actor)
        run.call = actor.begin.remote(job.run, self._trainable, errand)

    def order(self, run: str, order: Order) -> None:
        found = self._runs.get(run)
        if found is None or found.job.run != run or found.call is not None:
            return
        errand = self._errand_of_next(found, order) if isinstance(order, Next) else None
        if errand is None:
            said = Stop(save=order.save) if isinstance(order, Next) else order
            errand = dumps(Errand(said), "An order")
        found.call = found.actor.go_on.remote(errand)

    def _errand_of_next(self, run: _Run, order: Next) -> bytes | None:
        job = order.job
        if dict(job.resources) != dict(run.job.resources):
            raise UsageError(
                f"{job.trial_name} needs {dict(job.resources)}, so it can't go on in the process of "
                f"{run.job.trial_name}, which has {dict(run.job.resources)}; stop that and launch this"
            )
        directory = "" if "://" in job.path else os.path.abspath(job.path)
        try:
            errand = dumps(Errand(order, directory), f"The configuration of trial {job.trial_name}")
        except UsageError as error:
            self._events.append(Failed(run=job.run, error=str(error)))
            return None
        run.next = job
        self._runs[job.run] = run
        return errand

    def kill(self, run: str) -> None:
        found = self._runs.get(run)
        if found is None:
            return
        found.killed = run
        ray.kill(found.actor)
        if found.call is None:
            found.call = found.actor.go_on.remote(None)  # fails when it is dead

    def wait(self, timeout_s: float) -> Sequence[Event]:
        end = time.monotonic() + timeout_s
        while not self._events:
            left = max(0.0, end - time.monotonic())
            self._hear(left)
            if left <= 0:
                break
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        if not ray.is_initialized():
            return
        for run in set(self._runs.values()):
            ray.kill(run.actor)
        self._runs.clear()
        self._leaving.clear()
        if self._ours:
            ray.shutdown()

    # ---------------------------------------------------------------------------------------------- news

    def _hear(self, timeout_s: float) -> None:
        self._end_lingering()
        calls = {run.call: run for run in self._runs.values() if run.call is not None}
        if not calls:
            time.sleep(timeout_s)
            return
        if ray.wait(list(calls), timeout=timeout_s)[0]:
            for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
                self._take(calls[call], call)

    def _take(self, run: _Run, call: Any) -> None:
        try:
            told, over = ray.get(call)
        except RayError as error:
            self._over(run, error)
            return
        event: Event | None = None
        for text in told:
            event, before = event_of(text), run.job.run
            if isinstance(event, Started):
                run.started, run.node_ip = True, event.node_ip
            self._events += run.take(event)
            if run.job.run != before:
                del self._runs[before]
        if over:
            self._over(run, None)
        elif isinstance(event, Reported | Saved) and not run.killed:
            run.call = None
        else:
            run.call = run.actor.go_on.remote(None)

    def _over(self, run: _Run, error: RayError | None) -> None:
        events, follows = run.finish(lambda name: self._failure(run, name, error))
        self._events += events
        for name in [name for name, other in self._runs.items() if other is run]:
            del self._runs[name]
        self._pool.give_back(run.grant)
        if error is None:
            run.actor.__ray_terminate__.remote()
            self._leaving.append((time.monotonic() + _LINGER_S, run.actor))
        else:
            ray.kill(run.actor)  # one that can't be reached may live, and must not write beside its successor
        if follows is not None:
            self.launch(follows)

    def _end_lingering(self) -> None:
        now = time.monotonic()
        for _, actor in (found for found in self._leaving if found[0] < now):
            ray.kill(actor)
        self._leaving = [found for found in self._leaving if found[0] >= now]

    def _failure(self, run: _Run, name: str, error: RayError | None) -> Failed:
        if run.killed:
            return Failed(run=name, error="killed by the driver", killed=True)
        where = f" on {run.node_ip}" if run.node_ip else ""
        said = " ".join(str(error).split())
        if isinstance(error, OutOfMemoryError):
            words = f"killed by Ray{where}, as memory was running out: {said}"
        elif isinstance(error, RayActorError) and "node has died" in said:
            words = f"its machine died{where}"
        elif isinstance(error, ActorUnavailableError):
            words = f"its process or machine can't be reached{where}: {said}"
        elif isinstance(error, RayActorError):
            words = f"its process died{where} (killed? out of memory?): {_detail(said)}"
        else:
            traceback = str(error) if isinstance(error, RayTaskError) else ""
            return Failed(run=name, error=f"Ray could not run it{where}: {said}", traceback=traceback)
        return Failed(run=name, error=words, killed=True)


def _detail(said: str) -> str:
    """How Ray says that an actor ended, without what it says in general."""
    said = said.rpartition("Worker exit detail: ")[2]
    return said.partition(" Some common causes")[0]


def _connect(address: str | None) -> None:
    """Be a driver of a cluster; what happens on signals stays as it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ours(resources: dict[str, float]) -> dict[str, float]:
    """What a machine has, by keepstep's names; without what only Ray itself uses."""
    return {
        _NAMES.get(name, name): amount
        for name, amount in resources.items()
        if not name.startswith("node:") and name != "object_store_memory"
    }


def _holds(node: Resources, wanted: Resources) -> bool:
    """Whether one machine has all of it."""
    return all(node.get(name, 0.0) >= amount for name, amount in wanted.items())


def _options(job: Job) -> dict[str, Any]:
    """What Ray is told of an actor."""
    held = {name: amount for name, amount in job.resources.items() if amount}
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
    options |= {argument: held.pop(name) for name, argument in _ARGUMENTS.items() if name in held}
    if held:
        options["resources"] = held
    if job.env:
        options["runtime_env"] = {"env_vars": dict(job.env)}
    return options
