"""Real processes as ranks: each runs a function of a script file under gloo, one torch thread each."""

from __future__ import annotations

import contextlib
import datetime as dt
import faulthandler
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tests.forked import Forked


def _be_rank(script: str, function: str, argument: str, timeout_s: float, alone_with_group: bool) -> None:
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1 or alone_with_group:
        dist.init_process_group("gloo", timeout=dt.timedelta(seconds=60))
    spec = importlib.util.spec_from_file_location("ranks_script", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ranks_script"] = module
    spec.loader.exec_module(module)
    getattr(module, function)(argument, rank, size)
    print("DONE", flush=True)
    if size > 1:
        _leave_together(rank, size)
    os._exit(0)


def _leave_together(rank: int, size: int) -> None:
    """Rank 0 serves the store that the others may still be reading."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"bye/{rank}", "")
    if rank == 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"bye/{other}" for other in range(size)], dt.timedelta(seconds=3))


class RankProcesses:
    """One process a rank, running `function(argument, rank, size)` of a script."""

    def __init__(
        self,
        script: str | Path,
        function: str,
        size: int,
        argument: object = "",
        *,
        timeout_s: float = 90.0,
        alone_with_group: bool = True,
    ) -> None:
        self.timeout_s = timeout_s
        port = _free_port()
        self.processes = []
        for rank in range(size):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "TORCH_CPP_LOG_LEVEL": "FATAL",
            }
            self.processes.append(
                Forked(
                    *(_be_rank, str(script), function, str(argument), timeout_s, alone_with_group),
                    environment=environment,
                )
            )

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def outputs(self, ranks: Sequence[int] | None = None) -> list[str]:
        """What the ranks printed, once they have ended."""
        wanted = range(len(self.processes)) if ranks is None else ranks
        try:
            # All at once: a full pipe holds its writer up.
            with ThreadPoolExecutor(len(self.processes)) as readers:
                return list(readers.map(self._output, wanted))
        finally:
            for process in self.processes:
                if process.poll() is None and ranks is None:
                    process.kill()

    def _output(self, rank: int) -> str:
        return self.processes[rank].communicate(timeout=self.timeout_s + 10)[0]

    def kill(self) -> None:
        """Kill whoever still lives."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def run_ranks(
    script: str | Path, function: str, size: int, argument: object = "", **options: object
) -> list[str]:
    """Run to the end; every rank must end well."""
    ranks = RankProcesses(script, function, size, argument, **options)  # type: ignore[arg-type]
    outputs = ranks.outputs()
    for rank, output in enumerate(outputs):
        assert output.rstrip().endswith("DONE"), f"rank {rank} of {size}:\n" + "\n".join(
            f"[{number}] {text[-4000:]}" for number, text in enumerate(outputs)
        )
    return outputs


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
