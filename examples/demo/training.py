"""One run of examples/train_gpt.py: started, watched, killed and started again from outside."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from keepstep import Checkpoint, Store

__all__ = ["Deadline", "DemoError", "FinishedTooSoonError", "Loss", "Training"]

SCRIPT = Path(__file__).resolve().parent.parent / "train_gpt.py"
POLL_S = 0.002


class DemoError(Exception):
    """The demo failed; the message says how."""


class FinishedTooSoonError(DemoError):
    """A run ended before it could be killed."""


class Deadline:
    """Bounds every wait of the demo, so that it cannot hang.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._began_s = time.monotonic()

    @property
    def passed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began_s

    def pause(self, what: str, seconds: float = POLL_S) -> None:
        """Sleep a moment.

        Args:
            what: is being waited for.
            seconds: how long.

        Raises:
            DemoError: time is up.
        """
        if self.passed_s > self._seconds:
            raise DemoError(f"{what} is not over after {self.passed_s:.0f} s in all; --timeout allows more.")
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One line of a run's log.

    Attributes:
        step: optimizer steps done, from 1.
        loss: of the batch.
        pid: of the process, which tells attempts apart.
        clock_s: monotonic clock when it was written, in seconds.
    """

    step: int
    loss: float
    pid: int
    clock_s: float


class Training:
    """A run: a directory, a command, and the processes that it took.

    Args:
        name: to call it by.
        out: where it keeps checkpoints and losses.
        epochs: to train.
        batches: in an epoch.
        save_every: steps from one checkpoint to the next.

    Attributes:
        losses: read so far, of all attempts, in the order they were written.
    """

    def __init__(self, name: str, out: Path, *, epochs: int, batches: int, save_every: int) -> None:
        self.name = name
        self.out = out
        self.steps = epochs * batches
        self.losses: list[Loss] = []
        self.command = [sys.executable, str(SCRIPT), "--out", str(out), "--epochs", str(epochs)]
        self.command += ["--batches", str(batches), "--save-every", str(save_every)]
        self.store = Store(out / "checkpoints")
        self._output = out.with_name(f"{out.name}.output.txt")
        self._process: subprocess.Popen[bytes] | None = None
        self._read_bytes = 0
        self._left_over: set[str] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[Training]:
        """Start it, and leave no process behind, whatever happens."""
        self.start()
        try:
            yield self
        finally:
            self.kill()

    def start(self) -> None:
        """Start it, the first time or again, with the same command; on one thread, as it shares the cores."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._left_over = set(self._unfinished_names())
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | threads,
            )

    def start_over(self) -> None:
        """Forget everything, on the disk too."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.losses.clear()
        self._read_bytes = 0

    @property
    def pid(self) -> int:
        """Of the newest process."""
        assert self._process is not None
        return self._process.pid

    @property
    def output(self) -> str:
        """What the newest process printed."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def digest_and_sample(self) -> tuple[str, str]:
        """Digest of the weights it ended with, and the text it wrote then."""
        _, _, result = self.output.partition("weights: ")
        digest, _, sample = result.partition("\n")
        return digest, sample.strip()

    @property
    def attempt_step(self) -> int:
        """The last step of the newest process; 0 before its first."""
        return self.losses[-1].step if self.losses and self.losses[-1].pid == self.pid else 0

    def is_over(self) -> bool:
        """Read what is new in the log, and say whether the newest process ended well.

        Raises:
            DemoError: it ended otherwise.
        """
        assert self._process is not None
        code = self._process.poll()
        self._read()
        if code:
            raise DemoError(
                f"{self.name} ended with exit code {code} at step {self.attempt_step}. Its last words:\n"
                f"{self.output[-2000:]}\nThe command was: {' '.join(self.command)}"
            )
        return code == 0

    def _read(self) -> None:
        with contextlib.suppress(FileNotFoundError), (self.out / "losses.jsonl").open("rb") as log:
            log.seek(self._read_bytes)
            whole, newline, _ = log.read().rpartition(b"\n")
            self._read_bytes += len(whole + newline)
            self.losses += [Loss(**json.loads(line)) for line in whole.splitlines()]

    def kill(self) -> None:
        """Kill the process as `kill -9` does, and wait until it is gone; nothing if it ended before."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._read()

    def signal(self, number: int) -> None:
        """Send the newest process a signal.

        Raises:
            ProcessLookupError: it is gone.
        """
        assert self._process is not None
        if self._process.poll() is not None:
            raise ProcessLookupError(f"{self.name} is gone")
        self._process.send_signal(number)

    def kill_while_saving(self, deadline: Deadline) -> None:
        """Kill it at an instant at which an unfinished checkpoint lies on the disk.

        It is stopped when one shows up. If that was committed before the stop took hold, it goes on until
        the next one.
        """
        while True:
            self._wait_until(self.unfinished, "a checkpoint being written", deadline)
            self.signal(signal.SIGSTOP)
            self._wait_until(self._is_stopped, "the process being stopped", deadline)
            if self.unfinished():
                self.kill()
                return
            self.signal(signal.SIGCONT)

    def _wait_until(self, holds: Callable[[], object], what: str, deadline: Deadline) -> None:
        while not holds():
            if self.is_over():
                raise FinishedTooSoonError(f"{self.name} finished before it could be killed.")
            deadline.pause(what, POLL_S / 4)

    def _is_stopped(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOHANG) is not None

    def unfinished(self) -> str | None:
        """The checkpoint that the newest process is writing, or was when it was killed; None without one."""
        return next((name for name in self._unfinished_names() if name not in self._left_over), None)

    def _unfinished_names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.store.path) as entries:
            return [entry.name for entry in entries if ".tmp-" in entry.name]
        return []

    def final_checkpoint(self) -> Checkpoint:
        """The newest checkpoint.

        Raises:
            DemoError: it isn't of the last step.
        """
        newest = self.store.latest()
        if newest is None or newest.step != self.steps:
            found = "no checkpoint" if newest is None else f"{newest.name} of step {newest.step}"
            raise DemoError(f"{self.name} ended with {found}; it should be of step {self.steps}.")
        return newest
