"""Training functions started from where they stand: a notebook's cell, or a script.

Ranks are forked, so the function, and all that it uses, may be defined in the notebook. A fork cannot use a
GPU that this process has used, nor share its Accelerator; both are refused.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from keepstep.errors import RankFailedError, UsageError
from keepstep.launch.cuda import refuse_used_cuda, watch_cuda
from keepstep.launch.elastic import run_group
from keepstep.launch.environment import says_debug, variables
from keepstep.launch.leash import end_with
from keepstep.launch.machine import ThisMachine
from keepstep.launch.plan import LaunchPlan, Manner, Rendezvous, Script, plan_launch
from keepstep.launch.restarts import Restarts
from keepstep.launch.settings import settings_of
from keepstep.launch.values import as_int
from keepstep.patching import patch_environment
from keepstep.train.settings.environment import read_environment
from keepstep.train.states import accelerator_was_made

__all__ = ["debug_launcher", "notebook_launcher"]

_ANY_PORT: Final = "29500"
"""Accelerate's default; on one machine any free port does as well."""


def notebook_launcher(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    num_processes: int | None = None,
    mixed_precision: str = "no",
    use_port: str | int = _ANY_PORT,
    master_addr: str = "127.0.0.1",
    node_rank: int = 0,
    num_nodes: int = 1,
    rdzv_backend: str = "static",
    rdzv_endpoint: str = "",
    rdzv_conf: Mapping[str, Any] | None = None,
    rdzv_id: str = "none",
    max_restarts: int = 0,
    monitor_interval: float = 0.1,
    log_line_prefix_template: str | None = None,
) -> None:
    """Run a training function on several processes of this machine, from a notebook or a script.

    Make the Accelerator inside the function. Ranks train on GPUs if there are any, else, or with
    KEEPSTEP_USE_CPU set, on the CPU. With KEEPSTEP_DEBUG_MODE (or ACCELERATE_DEBUG_MODE) set before this is
    imported, the line that initialized CUDA too early is told.

    Args:
        function: what every rank runs.
        args: what it is given.
        num_processes: ranks on this machine; None for one to each GPU, or one on the CPU. A single one on a
            single machine runs in this process.
        mixed_precision: "no", "fp16" or "bf16", unless the function's Accelerator says otherwise.
        use_port: where several machines meet; on one machine a free port is taken for the default.
        master_addr: address of machine 0.
        node_rank: this machine's number, from 0.
        num_nodes: machines; each calls this with its `node_rank`.
        rdzv_backend: how machines find each other, "static" or a backend of torchrun.
        rdzv_endpoint: where, as "host:port"; empty for `master_addr` and `use_port`.
        rdzv_conf: more for that backend.
        rdzv_id: name of the run, the same on all machines.
        max_restarts: start failed ranks again at most so often, whatever failed.
        monitor_interval: seconds between looks at the ranks.
        log_line_prefix_template: as for torchrun; of no effect here, where output is not copied.

    Raises:
        UsageError: a value that is not allowed, an Accelerator or CUDA in use in this process.
        RankFailedError: a rank failed; the message has its traceback.
    """
    here = (ThisMachine().gpus or 1) if num_processes is None else num_processes
    found = {
        "num_processes": here * num_nodes if isinstance(here, int) and isinstance(num_nodes, int) else here,
        "num_machines": num_nodes,
        "machine_rank": node_rank,
        "mixed_precision": mixed_precision,
        "use_cpu": read_environment().use_cpu,
        "main_process_ip": master_addr,
        "main_process_port": None if num_nodes == 1 and str(use_port) == _ANY_PORT else use_port,
        "rdzv_backend": rdzv_backend,
    }
    manner = Manner(
        restarts=Restarts(limit=as_int("max_restarts", max_restarts, least=0), after_any_failure=True),
        monitor_interval_s=monitor_interval,
        rdzv_conf=rdzv_conf or {},
    )
    plan = plan_launch(
        settings_of(found, "notebook_launcher"), Script(target=_name(function)), manner, ThisMachine()
    )
    _run(_meeting(plan, rdzv_backend, rdzv_endpoint, rdzv_id), function, args, log_line_prefix_template)


def debug_launcher(function: Callable[..., Any], args: Sequence[Any] = (), num_processes: int = 2) -> None:
    """Run a function on several CPU processes, to find mistakes where there is no GPU.

    Args:
        function: what every rank runs; it makes its own Accelerator.
        args: what it is given.
        num_processes: ranks.

    Raises:
        UsageError: a value that is not allowed, or an Accelerator in use in this process.
        RankFailedError: a rank failed; the message has its traceback.
    """
    found = {"num_processes": num_processes, "use_cpu": True, "mixed_precision": "no"}
    manner = Manner(restarts=Restarts(limit=0))
    plan = plan_launch(
        settings_of(found, "debug_launcher"), Script(target=_name(function)), manner, ThisMachine()
    )
    _run(plan, function, args, None)


def _meeting(plan: LaunchPlan, backend: str, endpoint: str, run_id: str) -> LaunchPlan:
    if plan.rendezvous is None or not (endpoint or backend != "static"):
        return plan
    meeting = Rendezvous(
        backend=backend,
        endpoint=endpoint or plan.rendezvous.endpoint,
        run_id=run_id,
        conf={**plan.rendezvous.conf, **({"rank": plan.machine_rank} if backend == "static" else {})},
    )
    return replace(plan, rendezvous=meeting)


def _run(plan: LaunchPlan, function: Callable[..., Any], args: Sequence[Any], prefix: str | None) -> None:
    on_gpus = plan.device != "cpu" and ThisMachine().gpus > 0
    if plan.rendezvous is None:
        _say(f"Launching training on one {'GPU' if on_gpus else 'CPU'}.")
        with patch_environment(**plan.environment):
            function(*args)
        return
    if accelerator_was_made():
        raise UsageError(
            "An Accelerator was made in this process, from which ranks are to be forked. Make it inside the "
            "training function only; restart the notebook first."
        )
    if threading.current_thread() is not threading.main_thread():
        raise UsageError("Ranks can be started from the main thread only, as signals arrive there.")
    if on_gpus:
        refuse_used_cuda()
    _say(f"Launching training on {plan.processes} {'GPUs' if on_gpus else 'CPUs'}.")
    threads = {**variables(), **plan.environment}.get("OMP_NUM_THREADS", "")
    rank = _rank(function, int(threads) if threads.isdecimal() else 1)
    failures: list[tuple[int, str]] = []
    with patch_environment(**plan.environment):
        code = run_group(plan, rank, args, _say, prefix=prefix, failures=failures)
    if code:
        number, words = failures[-1] if failures else (0, "")
        raise RankFailedError(f"Rank {number} failed, and all were stopped.\n{words}", rank=number)


def _rank(function: Callable[..., Any], threads: int) -> Callable[..., None]:
    """What a forked rank calls: the function, with its share of the processors."""
    launcher = os.getpid()

    @functools.wraps(function, updated=())
    def rank(*args: Any) -> None:
        end_with(launcher)
        torch.set_num_threads(threads)
        function(*args)

    return rank


def _name(function: Callable[..., Any]) -> str:
    if not callable(function):
        raise UsageError(f"The training function is {function!r}; expected a function.")
    return str(getattr(function, "__qualname__", type(function).__name__))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if says_debug():
    watch_cuda()
