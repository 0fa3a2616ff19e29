"""The driver's end of a process that starts trials (`keepstep.tune.executors.server`)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from keepstep.errors import UsageError
from keepstep.tune.executors.environment import variables
from keepstep.tune.executors.kernel import kill_group, signal_name
from keepstep.tune.executors.server import BOOTSTRAP

__all__ = ["Flavour", "Server"]

_PATIENCE_S: Final = 5.0
_log = logging.getLogger(__name__)


class Flavour(NamedTuple):
    """What has to be so before anything is imported; trials that differ in it can't share a server.

    Attributes:
        threads: for libraries that compute in threads.
        gpus: whether trials have any; None: there are none on this machine.
        env: the jobs' own variables.
    """

    threads: int
    gpus: bool | None
    env: tuple[tuple[str, str], ...]

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its processes."""
        told = {"OMP_NUM_THREADS": str(self.threads)} | variables()
        told["TUNE_ORIG_WORKING_DIR"] = os.getcwd()
        if self.gpus is False:
            told["CUDA_VISIBLE_DEVICES"] = ""
        return told | dict(self.env)


class Server:
    """Starts trials of one flavour.

    Args:
        trainable: the descriptor of its bytes; closed here.
        flavour: of all its trials.
    """

    def __init__(self, trainable: int, flavour: Flavour) -> None:
        self.flavour = flavour
        self.runs = 0
        self.forks = False
        self._ready = False
        self._waiting: dict[str, tuple[int, dict[str, str]]] = {}
        self._shared: set[str] = set()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = self._spawn(theirs.fileno(), trainable)
        finally:
            os.close(trainable)
            theirs.close()
        self.control.setblocking(False)

    def _spawn(self, control: int, trainable: int) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise UsageError(
                "sys.executable is empty, so trials can't be started as processes; run them in this one "
                "(the inline executor)"
            )
        told = {
            "path": [str(Path(path).absolute()) for path in sys.path],
            "script": sys.argv[0] if sys.argv else "",
            "call": "main",
            "control": control,
            "trainable": trainable,
            "driver": os.getpid(),
        }
        return subprocess.Popen(
            [sys.executable, "-c", BOOTSTRAP, json.dumps(told)],
            pass_fds=(control, trainable),
            env=self.flavour.variables,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self, run: str, connection: int, env: dict[str, str]) -> None:
        """Have a trial's process started; the descriptor of its connection is closed here."""
        self.runs += 1
        if self._ready:
            self._send_start(run, connection, env)
        else:
            self._waiting[run] = (connection, env)

    def _send_start(self, run: str, connection: int, env: dict[str, str]) -> None:
        self._send({"do": "start", "run": run, "env": env}, connection)
        os.close(connection)

    def kill(self, run: str) -> bool:
        """Have it killed; False: it had not even begun, and does not."""
        waiting = self._waiting.pop(run, None)
        if waiting is not None:
            os.close(waiting[0])
            return False
        self._send({"do": "kill", "run": run})
        return True

    def share(self, modules: list[str]) -> None:
        """Have it import what a trial imported, before it forks the next."""
        news = [name for name in modules if name not in self._shared]
        self._shared.update(news)
        if (
            news and self.forks and self.flavour.threads == 1
        ):  # with more, libraries start threads when imported
            self._send({"do": "preload", "modules": news})

    def _send(self, said: dict[str, Any], *descriptors: int) -> None:
        self.control.setblocking(True)
        try:
            socket.send_fds(self.control, [json.dumps(said).encode()], descriptors)
        except OSError:
            pass  # it is dead, and `news` will say so
        finally:
            self.control.setblocking(False)

    def news(self) -> Iterator[dict[str, Any]]:
        """What it tells now.

        Raises:
            EOFError: it is dead.
        """
        while True:
            try:
                data = self.control.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                raise EOFError
            said: dict[str, Any] = json.loads(data)
            if "ready" in said:
                self._settled(said["ready"])
            else:
                yield said

    def _settled(self, why_not: str | None) -> None:
        self._ready, self.forks = True, why_not is None
        if why_not is not None:
            _log.info(
                "Each trial's process imports everything anew: no copy of one can be made, as %s", why_not
            )
        for run, (connection, env) in self._waiting.items():
            self._send_start(run, connection, env)
        self._waiting.clear()

    def close(self) -> None:
        """End it, with everything that it started."""
        self.control.close()
        for connection, _ in self._waiting.values():
            os.close(connection)
        self._waiting.clear()
        try:
            self._process.wait(_PATIENCE_S if self._ready else 0.05)
        except subprocess.TimeoutExpired:
            kill_group(self._process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_S)

    def how_it_ended(self) -> str:
        """For people, once it is dead."""
        try:
            code = self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            kill_group(self._process.pid)
            code = self._process.wait()
        return signal_name(-code) if code < 0 else f"status {code}"
