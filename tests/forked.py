"""Real processes in milliseconds: forked from one that has imported torch and keepstep, which takes seconds.

The server has run nothing and holds one thread; what it forks has the environment, directory and path of the
process that asks, as if it had been started afresh. `in_fork` forks the very process that asks, with all that
it has open, as a data loader does.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = [
    *("keepstep.train.accelerator", "keepstep.checkpoint.dcp.writing", "keepstep.checkpoint.dcp.reading"),
    *("torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "pytest"),
]


class Forked:
    """A process that calls a function of a module; what it prints is read from `stdout`.

    Names as in `subprocess.Popen`.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        _ensure_server()
        reading, writing = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(
            target=_begin,
            args=(
                *(writing, dict(environment or os.environ), multiprocessing.get_start_method()),
                *(function, arguments),
            ),
            daemon=True,  # it never outlives the tests
        )
        self._process.start()
        writing.close()
        self.stdout: IO[str] = os.fdopen(os.dup(reading.fileno()), encoding="utf-8", errors="replace")
        reading.close()
        self._rest = ""

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """How it ended; None while it lives."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; how it ended."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; what it printed that nobody read yet."""
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        reader.join(timeout)
        if reader.is_alive():
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        self.wait(timeout)
        return self._rest, None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still lives."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _read(self) -> None:
        if not self.stdout.closed:
            with self.stdout:
                self._rest = self.stdout.read()


def run_program(
    program: str | Path,
    *arguments: object,
    cwd: Path | None = None,
    timeout_s: float = 150,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; see `start_program`. What it printed anywhere is `stdout`."""
    process = start_program(program, *arguments, cwd=cwd, environment=environment)
    try:
        said, _ = process.communicate(timeout_s)
    finally:
        process.kill()
    return subprocess.CompletedProcess([str(program)], process.wait(), said)


def start_program(
    program: str | Path,
    *arguments: object,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    start_new_session: bool = False,
) -> Forked:
    """Start a program as `python -c` or `python FILE` would: a text is Python, a `Path` a file of it.

    Not for what hangs on the end of the interpreter itself: functions registered with atexit are called,
    modules are not torn down.
    """
    given = [str(argument) for argument in arguments]
    place = cwd or Path.cwd()
    return Forked(_be_program, program, given, place, start_new_session, environment=environment)


def _be_program(program: str | Path, arguments: list[str], cwd: Path, new_session: bool) -> None:
    os.chdir(cwd)
    if new_session:
        os.setsid()
    is_file = isinstance(program, Path)
    source = program.read_text("utf-8") if isinstance(program, Path) else program
    name = str(program) if isinstance(program, Path) else "-c"
    sys.argv = [name, *arguments]
    sys.path.insert(0, str(Path(name).parent) if is_file else "")
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if is_file:
        main.__file__ = name
    try:
        exec(compile(source, name, "exec"), vars(main))
    finally:  # as at the end of an interpreter
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


def in_fork(work: Callable[[], object], timeout_s: float = 60) -> int:
    """Fork this process and run `work` there; its exit code, as of `end_of_fork`."""
    return end_of_fork(begin_fork(work), timeout_s)


def begin_fork(work: Callable[[], object]) -> int:
    """Fork this process and run `work` there, and nothing else, whatever happens; its id.

    It ends with 0 once `work` returns, and with 1 if that raises, which is told on standard error.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - the exit code tells
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def end_of_fork(pid: int, timeout_s: float = 60) -> int:
    """Wait for the end of a fork; its exit code, or the negative number of the signal that killed it."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a fork still runs after {timeout_s} s")


def _ensure_server() -> None:
    with pytest.MonkeyPatch.context() as patch:  # what C++ reads once, when it is loaded
        patch.setenv("TORCH_CPP_LOG_LEVEL", "FATAL")
        patch.setenv("OMP_NUM_THREADS", "1")
        _CONTEXT.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()


def _begin(
    output: Connection,
    environment: dict[str, str],
    start_method: str,
    function: Callable[..., object],
    arguments: tuple[Any, ...],
) -> None:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - a descriptor, open as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(start_method, force=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have workers
    gc.freeze()  # what the server imported stays
    np.random.seed()  # noqa: NPY002 - each process its own, as when it had just started
    function(*arguments)
