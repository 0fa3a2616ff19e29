"""Trials in processes of this machine."""

from __future__ import annotations

import json
import math
import os
import selectors
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.executors.environment import variables, visible_gpus
from keepstep.tune.executors.kernel import kill_group
from keepstep.tune.executors.machine import machine_total
from keepstep.tune.executors.process import MODULES
from keepstep.tune.executors.protocol import Event, Failed, Job, Next, Order, Resources, Stop
from keepstep.tune.executors.resources import GPU, Grant, Pool, PooledExecutor
from keepstep.tune.executors.running import Run
from keepstep.tune.executors.servers import Flavour, Server
from keepstep.tune.executors.shipping import ship
from keepstep.tune.executors.wire import event_of

__all__ = ["LocalExecutor"]

_LINGER_S: Final = 30.0
"""How long a process may take to end once its trial is over."""
_IDLE_SERVERS: Final = 2
_MODULES: Final = json.dumps([MODULES])[:-1].encode()


class LocalExecutor(PooledExecutor):
    """An `Executor` that runs each trial in a process of its own.

    Args:
        trainable: the function or class that trials run.
        total: what there is in all, as {"cpu": 8, "gpu": 2, "licence": 1}; None: what this machine has.

    Raises:
        UsageError: the trainable can't travel to another process, or this is not Linux.
    """

    def __init__(self, trainable: Any, *, total: Resources | None = None) -> None:
        if sys.platform != "linux":
            raise UsageError(
                f'The executor "local" keeps processes together by means of Linux, not {sys.platform}; '
                'choose "inline", which runs trials in this process, or "ray"'
            )
        machine, gpus = machine_total(visible_gpus()) if total is None else (dict(total), ())
        super().__init__(Pool(machine, gpus))
        self._trainable = trainable
        self._shipped: int | None = ship(trainable, "The trainable")
        self._servers: dict[Flavour, Server] = {}
        self._runs: dict[str, Run] = {}
        self._events: list[Event] = []
        self._selector = selectors.DefaultSelector()

    def launch(self, job: Job) -> None:
        run = Run(job, self._pool.take(job.resources))
        try:
            run.send_job(job)
        except UsageError as error:
            run.close()
            self._pool.give_back(run.grant)
            self._events.append(Failed(run=job.run, error=str(error)))
            return
        env = {"CUDA_VISIBLE_DEVICES": ",".join(run.grant.devices)} if run.grant.devices else {}
        run.server = self._server(job, run.grant)
        run.server.start(job.run, run.theirs.detach(), env)
        self._runs[job.run] = run
        self._selector.register(run.connection, selectors.EVENT_READ, run)
        self._flush(run)

    def order(self, run: str, order: Order) -> None:
        found = self._runs.get(run)
        if found is None or found.killed or found.job.run != run or found.last is not None:
            return
        if isinstance(order, Next):
            self._order_next(found, order)
        else:
            found.send(order)
        self._flush(found)

    def _order_next(self, run: Run, order: Next) -> None:
        job = order.job
        if dict(job.resources) != dict(run.job.resources):
            raise UsageError(
                f"{job.trial_name} needs {dict(job.resources)}, so it can't go on in the process of "
                f"{run.job.trial_name}, which has {dict(run.job.resources)}; stop that and launch this"
            )
        try:
            run.send_job(order)
        except UsageError as error:
            run.send(Stop(save=order.save))
            self._events.append(Failed(run=job.run, error=str(error)))
            return
        run.next = job
        self._runs[job.run] = run

    def kill(self, run: str) -> None:
        found = self._runs.get(run)
        if found is None:
            return
        found.killed = run
        if found.server is not None and not found.server.kill(found.first):
            self._over(found, None)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        end = time.monotonic() + timeout_s
        while not self._events:
            left = end - time.monotonic()
            self._look(max(0.0, min(left, 1.0)))
            if left <= 0:
                break
        if self._events:
            self._look(0.0)  # what has come meanwhile is dealt with in the same turn
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()
        for run in set(self._runs.values()):
            run.close()
        self._runs.clear()
        self._selector.close()
        if self._shipped is not None:
            os.close(self._shipped)
            self._shipped = None

    # ----------------------------------------------------------------------------------------- servers

    def _server(self, job: Job, grant: Grant) -> Server:
        said = (variables() | dict(job.env)).get("OMP_NUM_THREADS", "")
        flavour = Flavour(
            threads=int(said) if said.isdecimal() else max(1, math.ceil(job.resources.get("cpu", 0.0))),
            gpus=bool(grant.devices) if self._pool.total.get(GPU) else None,
            env=tuple(sorted(job.env.items())),
        )
        server = self._servers.pop(flavour, None)
        if server is None:
            self._close_idle()
            shipped = self._shipped if self._shipped is not None else ship(self._trainable, "The trainable")
            self._shipped = None
            server = Server(shipped, flavour)
            self._selector.register(server.control, selectors.EVENT_READ, server)
        self._servers[flavour] = server  # the last one used is last
        return server

    def _close_idle(self) -> None:
        idle = [flavour for flavour, server in self._servers.items() if server.runs == 0]
        for flavour in idle[: max(0, len(idle) - _IDLE_SERVERS + 1)]:
            server = self._servers.pop(flavour)
            self._selector.unregister(server.control)
            server.close()

    def _look(self, timeout_s: float) -> None:
        for key, mask in self._selector.select(timeout_s):
            if isinstance(key.data, Server):
                self._hear_server(key.data)
            elif key.data.connection.fileno() >= 0:
                if mask & selectors.EVENT_WRITE:
                    self._flush(key.data)
                if mask & selectors.EVENT_READ:
                    self._hear(key.data)
        now = time.monotonic()
        for run in list(self._runs.values()):
            if run.lingers_until < now and run.server is not None:
                run.lingers_until = math.inf
                run.server.kill(run.first)

    def _hear_server(self, server: Server) -> None:
        try:
            for said in server.news():
                run = self._by_first(said.get("started") or said["ended"])
                if run is None:
                    continue
                if "started" in said:
                    run.pid = said["pid"]
                else:
                    self._over(run, said["status"])
        except EOFError:
            self._selector.unregister(server.control)
            self._servers = {f: s for f, s in self._servers.items() if s is not server}
            how = server.how_it_ended()
            for run in {run for run in self._runs.values() if run.server is server}:
                if run.pid is not None:
                    kill_group(run.pid)
                self._over(
                    run, None, f"the process that starts trials was ended ({how}), and its trials with it"
                )
            server.close()

    def _by_first(self, name: str) -> Run | None:
        return next((run for run in self._runs.values() if run.first == name), None)

    # -------------------------------------------------------------------------------------------- runs

    def _flush(self, run: Run) -> None:
        wanted = selectors.EVENT_READ if run.flush() else selectors.EVENT_READ | selectors.EVENT_WRITE
        if not run.deaf and self._selector.get_key(run.connection).events != wanted:
            self._selector.modify(run.connection, wanted, run)

    def _hear(self, run: Run) -> None:
        was_deaf = run.deaf
        for data in run.hear():
            self._hear_frame(run, data)
        if run.deaf and not was_deaf:
            self._selector.unregister(run.connection)
            run.lingers_until = time.monotonic() + _LINGER_S

    def _hear_frame(self, run: Run, data: bytes) -> None:
        if data.startswith(_MODULES):
            if run.server is not None:
                run.server.share(json.loads(data)[1])
            return
        before = run.job.run
        try:
            self._events += run.take(event_of(data))
        except ValueError as error:
            run.last = Failed(run=run.job.run, error=f"its process sent what is no event: {error}")
            self.kill(run.job.run)
        if run.job.run != before:
            del self._runs[before]
        if run.last is not None:
            run.lingers_until = time.monotonic() + _LINGER_S

    def _over(self, run: Run, status: int | None, why: str | None = None) -> None:
        self._hear(run)
        events, follows = run.end(status, why)
        self._events += events
        for name in [name for name, other in self._runs.items() if other is run]:
            del self._runs[name]
        if not run.deaf:
            self._selector.unregister(run.connection)
        run.close()
        self._pool.give_back(run.grant)
        if run.server is not None:
            run.server.runs -= 1
        if follows is not None:
            self.launch(follows)
