"""Real processes as ranks: each runs a function of a script file under gloo, one torch thread each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_START = (
    "import sys, os, faulthandler\n"
    "faulthandler.dump_traceback_later(float(sys.argv[4]), exit=True)\n"
    "import torch, torch.distributed as dist\n"
    "torch.set_num_threads(1)\n"
    "import datetime\n"
    "rank, size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
    "if size > 1 or sys.argv[5] == 'yes':\n"
    "    dist.init_process_group('gloo', timeout=datetime.timedelta(seconds=60))\n"
    "import importlib.util\n"
    "spec = importlib.util.spec_from_file_location('ranks_script', sys.argv[1])\n"
    "module = importlib.util.module_from_spec(spec)\n"
    "sys.modules['ranks_script'] = module\n"
    "spec.loader.exec_module(module)\n"
    "getattr(module, sys.argv[2])(sys.argv[3], rank, size)\n"
    "print('DONE', flush=True)\n"
    "if size > 1:  # rank 0 serves the store that the others may still be reading\n"
    "    store = dist.distributed_c10d._get_default_store()\n"
    "    store.set(f'bye/{rank}', '')\n"
    "    try:\n"
    "        if rank == 0: store.wait([f'bye/{r}' for r in range(size)], datetime.timedelta(seconds=3))\n"
    "    except RuntimeError: pass\n"
    "os._exit(0)\n"
)


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
            with_group = "yes" if alone_with_group else "no"
            arguments = [str(script), function, str(argument), str(timeout_s), with_group]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-c", _START, *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def outputs(self, ranks: Sequence[int] | None = None) -> list[str]:
        """What the ranks printed, once they have ended."""
        wanted = range(len(self.processes)) if ranks is None else ranks
        try:
            return [self.processes[rank].communicate(timeout=self.timeout_s + 10)[0] for rank in wanted]
        finally:
            for process in self.processes:
                if process.poll() is None and ranks is None:
                    process.kill()

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
