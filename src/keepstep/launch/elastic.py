"""Many processes on one machine or several, by the elastic agent of torch.distributed.run.

The agent is torch's own. What is added: what failed is told, and whether ranks are started again is decided
by `keepstep.launch.restarts`; signals that end nothing are passed on; a second Ctrl-C waits for nobody; and
each start of the ranks gets a key-value store of its own. (The agent hands them the same one again, where
what the dead ranks wrote still lies: gloo then connects to addresses where nobody listens.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from keepstep.launch.plan import LaunchPlan, Rendezvous
from keepstep.launch.restarts import RankEnd, Restarts, exit_code_of, judge
from keepstep.launch.single import ENDING, PASSED_ON, outlives_its_terminal

__all__ = ["run_group"]

_RENDEZVOUS_TIMEOUT_S: Final = 900
_LAST_WORDS_S: Final = 600
"""How long ranks have after a signal that ends the run: a checkpoint may take minutes."""
_STOP_S: Final = 30
"""After so long torch kills the ranks that did not stop when another failed."""
_PREFIX: Final = "[${role_name} ${rank}] "


def run_group(
    plan: LaunchPlan,
    entrypoint: Callable[..., Any] | str,
    arguments: Sequence[Any],
    say: Callable[[str], None],
    *,
    prefix: str | None = None,
    failures: list[tuple[int, str]] | None = None,
) -> int:
    """Run a plan's processes on this machine until all are done, again when they are to be restarted.

    Args:
        plan: what to run; the environment has been set, and so that ranks inherit it.
        entrypoint: a program, or a function that forked ranks call.
        arguments: what each rank is given.
        say: tells the user what happens.
        prefix: template in front of each line of output with `tee`; None for the role and rank.
        failures: gets the rank that failed first and what it said, for each start that failed.

    Returns:
        the exit code: 0, or that of the rank that failed first, 128 and the signal's number if it was killed.
    """
    assert plan.rendezvous is not None, "a single process needs no group"
    with contextlib.ExitStack() as stack:
        log_dir = plan.manner.log_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="keepstep-"))
        stack.enter_context(_quiet_torch())
        spec = _spec(plan, plan.rendezvous, entrypoint, arguments)
        agent = _Agent(
            spec,
            DefaultLogsSpecs(log_dir=log_dir, tee=Std.from_str(plan.manner.tee or "0")),
            prefix or _PREFIX,
            restarts=plan.manner.restarts,
            say=say,
        )
        stack.enter_context(_passing(agent))
        code = _result(agent, spec)
    if failures is not None:
        failures += agent.told
    return code


def _result(agent: _Agent, spec: WorkerSpec) -> int:
    try:
        result = agent.run()
    except SignalException as ended:
        return 128 + int(ended.sigval)  # the meeting is left open, as other machines may still be in it
    spec.rdzv_handler.shutdown()
    if result is None or not result.is_failed():
        return 0
    return exit_code_of(agent.first_failure) if agent.first_failure else 1


def _spec(
    plan: LaunchPlan, meeting: Rendezvous, entrypoint: Callable[..., Any] | str, arguments: Sequence[Any]
) -> WorkerSpec:
    host, _, _ = meeting.endpoint.rpartition(":")
    address = host if plan.machines == 1 else None
    conf = {"timeout": _RENDEZVOUS_TIMEOUT_S, **meeting.conf}
    parameters = RendezvousParameters(
        backend=meeting.backend,
        endpoint=meeting.endpoint,
        run_id=meeting.run_id or uuid.uuid4().hex,
        min_nodes=plan.machines,
        max_nodes=plan.machines,
        local_addr=address,
        **conf,
    )
    fixed = meeting.backend == "static"
    return WorkerSpec(
        role=plan.manner.role,
        local_world_size=plan.processes,
        entrypoint=entrypoint,
        args=tuple(arguments),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=plan.manner.restarts.limit,
        monitor_interval=plan.manner.monitor_interval_s,
        master_addr=host if fixed else None,
        master_port=int(meeting.endpoint.rpartition(":")[2]) if fixed else None,
        local_addr=address,
    )


class _Agent(LocalElasticAgent):
    """Torch's agent, with a say in whether ranks are started again."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        prefix: str,
        *,
        restarts: Restarts,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(
            spec,
            logs,
            start_method="fork",
            log_line_prefix_template=prefix,
            shutdown_timeout=_LAST_WORDS_S,
        )
        self._restarts = restarts
        self._say = say
        self._began_s = time.monotonic()
        self.first_failure = 0
        self.told: list[tuple[int, str]] = []
        self._store_of_ranks: TCPStore | None = None
        self._starts = 0
        self._outlives_its_terminal = outlives_its_terminal()

    def pids(self) -> list[int]:
        """The processes of this machine's ranks."""
        return list(self._pcontext.pids().values()) if self._pcontext else []

    def _rendezvous(self, worker_group: Any) -> None:
        super()._rendezvous(worker_group)
        meeting = worker_group.store
        # The static backend shows the same keys at each rendezvous, the others fresh ones.
        name = "keepstep/port"
        if worker_group.spec.rdzv_handler.get_backend() == "static":
            name += f"/{self._starts}"
        self._starts += 1
        if worker_group.group_rank == 0:
            self._store_of_ranks = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            meeting.set(name, str(self._store_of_ranks.port))
        worker_group.master_port = int(meeting.get(name))

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        self._began_s = time.monotonic()
        workers: dict[int, Any] = super()._start_workers(worker_group)
        if self._outlives_its_terminal:  # torch has just put a handler of its own there
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return workers

    def _monitor_workers(self, worker_group: Any) -> RunResult:
        looked_s = time.monotonic()
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state not in {WorkerState.FAILED, WorkerState.UNHEALTHY}:
            return result
        stopped_by_us = {-signal.SIGTERM}
        if time.monotonic() - looked_s >= _STOP_S:
            stopped_by_us.add(-signal.SIGKILL)
        ends = _own_ends(result.failures, stopped_by_us)
        self.first_failure = ends[0].returncode if ends else 1
        self.told += [(end.rank, _words_of(result.failures[end.rank])) for end in ends[:1]]
        verdict = judge(
            ends,
            # An error here may be the loss of a rank on another machine, which nobody here can see.
            killed=worker_group.group_world_size != 1 or any(end.returncode < 0 for end in ends),
            lived_s=looked_s - self._began_s,
            restarted=self._worker_group.spec.max_restarts - self._remaining_restarts,
            restarts=self._restarts,
        )
        self._say(verdict.words)
        if not verdict.restart:
            self._remaining_restarts = 0
        return result

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = _STOP_S) -> None:
        try:
            until_s = time.monotonic() + timeout
            self._end_ranks(death_sig, until_s)
            super()._shutdown(death_sig, max(1, int(until_s - time.monotonic())))
        except SignalException:
            super()._shutdown(signal.SIGKILL, 1)
            raise

    def _end_ranks(self, number: signal.Signals, until_s: float) -> None:
        """A rank that saves before it ends needs what it started, such as the workers that load its data.

        Torch signals all at once: ranks are told before it does, and what they leave behind afterwards.
        """
        if not isinstance(self._pcontext, SubprocessContext):
            return
        handlers = self._pcontext.subprocess_handlers.values()
        ranks = [handler.proc for handler in handlers if handler.proc.poll() is None]
        for rank in ranks:
            rank.send_signal(number)
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.wait(max(0.0, until_s - time.monotonic()))
            if rank.returncode is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, number)


def _own_ends(failures: dict[int, ProcessFailure], stopped_by_us: set[int]) -> list[RankEnd]:
    """The ranks that failed by themselves, killed ones first; torch reports those that it stopped as well."""
    ends = [
        RankEnd(rank=rank, pid=failure.pid, returncode=failure.exitcode) for rank, failure in failures.items()
    ]
    own = [end for end in ends if end.returncode not in stopped_by_us] or ends[:1]
    return sorted(own, key=lambda end: end.returncode >= 0)


def _words_of(failure: ProcessFailure) -> str:
    """A rank's traceback, where it left one (functions do), else how it ended."""
    message: Any = failure.message
    if isinstance(message, dict):
        return str(message.get("extraInfo", {}).get("py_callstack") or message.get("message"))
    return f"{RankEnd(rank=failure.local_rank, pid=failure.pid, returncode=failure.exitcode).words}."


@contextlib.contextmanager
def _passing(agent: _Agent) -> Iterator[None]:
    """Ranks get the signals that end nothing; those that end the run are torch's business.

    What this process does at a signal is the same afterwards as before: torch leaves its own handlers behind.
    """

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for pid in agent.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.getsignal(number) for number in (*ENDING, *PASSED_ON)}
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_torch() -> Iterator[None]:
    """What torch's agent logs of each rank that it stops is told by `say` in a line."""
    noisy = ("torch.distributed.elastic", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(noisy)]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
