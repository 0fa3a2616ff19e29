"""A process that makes the trainable out of its bytes once, and forks a process for each trial.

It has one thread and no GPU, so a fork is safe, takes a millisecond, and shares the memory of what was
imported. If making the trainable started threads or initialized CUDA, each trial's process is started from
scratch instead. What a trial's processes leave behind is killed; all of it ends when the driver does.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from typing import Any, Final

from keepstep.checkpoint.collector import collector_paused
from keepstep.tune.executors.environment import put, variables
from keepstep.tune.executors.kernel import (
    adopt_orphans,
    children,
    die_with_parent,
    end_orphans,
    kill_group,
    why_not_to_fork,
)
from keepstep.tune.executors.process import Loaded, run_trial
from keepstep.tune.executors.shipping import receive_from

__all__ = ["BOOTSTRAP", "main", "main_of_one"]

BOOTSTRAP: Final = (
    "import sys, json\n"
    "told = json.loads(sys.argv[1])\n"
    "sys.path[:], sys.argv[:] = told.pop('path'), [told.pop('script')]\n"
    "from keepstep.tune.executors import server\n"
    "getattr(server, told.pop('call'))(**told)\n"
)
"""What a fresh interpreter is started with, and one argument of JSON."""

_MESSAGE_BYTES: Final = 1 << 18


def main(control: int, trainable: int, driver: int) -> None:
    """Serve until the driver is gone.

    Args:
        control: the descriptor of the socket to the driver.
        trainable: the descriptor of the trainable's bytes.
        driver: the driver's process id.
    """
    _Server(socket.socket(fileno=control), trainable, driver).serve()


def main_of_one(connection: int, trainable: int, run: str, server: int) -> None:
    """Be the process of one trial, started from scratch.

    Args:
        connection: the descriptor of the socket to the driver.
        trainable: the descriptor of the trainable's bytes.
        run: the job's.
        server: the process id of the server.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server ignores
    die_with_parent(server)
    adopt_orphans()
    run_trial(socket.socket(fileno=connection), run, _load(trainable))


def _load(trainable: int) -> Loaded:
    made, raised = None, None
    try:
        with collector_paused():  # importing torch is a million objects that all stay
            made = receive_from(trainable)
    except BaseException as error:  # noqa: BLE001 - the user's modules may raise anything, SystemExit too
        raised = error
    return Loaded(made, raised, frozenset(sys.modules))


class _Server:
    def __init__(self, control: socket.socket, trainable: int, driver: int) -> None:
        self._control = control
        self._trainable = trainable
        self._driver = driver
        self._pid = os.getpid()
        self._trials: dict[int, str] = {}
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)
        die_with_parent(driver, signal.SIGTERM)
        adopt_orphans()
        self._woken, wakes = socket.socketpair()
        self._wakes = wakes
        for end in (self._woken, wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._loaded = _load(trainable)
        self._settle()

    def _settle(self) -> None:
        """Make ready to fork, and tell the driver how trials are started."""
        self._why_not = why_not_to_fork()
        self._own = frozenset({*children()} - self._trials.keys())  # of the user's modules, and no trial's
        gc.collect()
        gc.freeze()
        self._tell({"ready": self._why_not})

    def serve(self) -> None:
        """Take commands and reap trials until the driver is gone."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._control:
                        self._command()
                with contextlib.suppress(BlockingIOError):
                    self._woken.recv(4096)
                self._reap()

    def _tell(self, said: dict[str, Any]) -> None:
        try:
            self._control.sendall(json.dumps(said).encode())
        except OSError:
            self._close()

    def _command(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, _MESSAGE_BYTES, 1)
        except OSError:
            data = b""
        if not data:
            self._close()
        said = json.loads(data)
        match said["do"]:
            case "start":
                self._start(said["run"], descriptors[0], said["env"])
            case "kill":
                for pid, run in self._trials.items():
                    if run == said["run"]:
                        kill_group(pid)
            case "preload":
                self._preload(said["modules"])

    # ------------------------------------------------------------------------------------------ trials

    def _start(self, run: str, connection: int, env: dict[str, str]) -> None:
        if self._why_not is None:
            pid = os.fork()
            if pid == 0:
                self._be_trial(run, connection, env)
        else:
            pid = self._start_anew(run, connection, env)
        os.close(connection)
        self._trials[pid] = run
        self._tell({"started": run, "pid": pid})

    def _be_trial(self, run: str, connection: int, env: dict[str, str]) -> None:
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            die_with_parent(self._pid)
            adopt_orphans()
            for end in (self._control, self._woken, self._wakes):
                end.close()
            atexit._clear()
            put(env)
            _draw_anew()
            run_trial(socket.socket(fileno=connection), run, self._loaded)
        finally:
            os._exit(1)

    def _start_anew(self, run: str, connection: int, env: dict[str, str]) -> int:
        told = {
            "path": sys.path,
            "script": sys.argv[0],
            "call": "main_of_one",
            "connection": connection,
            "trainable": self._trainable,
            "run": run,
            "server": self._pid,
        }
        return subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, json.dumps(told)],
            pass_fds=(connection, self._trainable),
            env=variables() | env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        ).pid

    def _preload(self, modules: list[str]) -> None:
        """Import what a trial imported, so that the next ones need not."""
        if self._why_not is None:
            for name in modules:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            self._loaded = self._loaded._replace(modules=frozenset({*sys.modules, *modules}))
            self._settle()

    # -------------------------------------------------------------------------------------------- ends

    def _reap(self) -> None:
        ended: list[tuple[str, int]] = []
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if found is None:
                break
            run = self._trials.pop(found.si_pid, None)
            if run is not None:
                kill_group(found.si_pid)  # while the number is still taken
            status = os.waitpid(found.si_pid, 0)[1]
            if run is not None:
                ended.append((run, status))
        if ended:
            end_orphans(self._own | self._trials.keys())
        for run, status in ended:
            self._tell({"ended": run, "status": os.waitstatus_to_exitcode(status)})

    def _terminate(self, *_: object) -> None:
        if os.getppid() != self._driver:
            self._close()

    def _close(self) -> None:
        """The driver is gone, or has closed: nothing stays."""
        for pid in self._trials:
            kill_group(pid)
        end_orphans(())
        os._exit(0)


def _draw_anew() -> None:
    """NumPy's global generator was seeded before the fork: seed it anew, unless code had seeded it."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        _, words, place, *_ = random.get_state()
        if words[0] == 0x80000000 and place >= len(words) - 1:  # as it is when nobody seeded it or drew
            random.seed()
