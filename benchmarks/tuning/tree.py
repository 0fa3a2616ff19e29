"""All processes of one command: what descends from it, and daemons that carry its mark in the environment."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import Final

import psutil

__all__ = ["MARK", "Tree", "TreePeak"]

MARK: Final = "KEEPSTEP_BENCHMARK"
"""The variable in whose value a process says which command it belongs to."""

_SAMPLE_EVERY_S: Final = 0.2
_GONE: Final = (psutil.NoSuchProcess, psutil.AccessDenied, OSError)


@dataclass(frozen=True, kw_only=True)
class TreePeak:
    """The moment at which most was resident.

    Attributes:
        rss_bytes: what is resident, shared pages counted with each process.
        pss_bytes: the same, each shared page counted once in all.
        processes: how many there were.
    """

    rss_bytes: int = 0
    pss_bytes: int = 0
    processes: int = 0


class Tree:
    """Watches the processes of a command.

    Args:
        mark: the value of `MARK` in its environment.
        patience_s: how long its daemons may take to end once it is over.
    """

    def __init__(self, mark: str, *, patience_s: float = 30.0) -> None:
        self._mark = mark
        self._patience_s = patience_s
        self._known: dict[tuple[int, float], bool] = {}
        self._over = threading.Event()
        self.peak = TreePeak()

    def processes(self) -> list[psutil.Process]:
        """Those that run now."""
        parents: dict[int, int] = {}
        ours: dict[int, psutil.Process] = {}
        others: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(*_GONE):
                parents[process.pid] = process.ppid()
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if self._is_marked(process):
                    ours[process.pid] = process
                else:
                    others.append(process)
        grown = True
        while grown:
            found = {p.pid: p for p in others if p.pid not in ours and parents.get(p.pid) in ours}
            ours |= found
            grown = bool(found)
        return list(ours.values())

    def _is_marked(self, process: psutil.Process) -> bool:
        key = (process.pid, process.create_time())
        if not self._known.get(key):  # a process that was just forked may be about to become another program
            self._known[key] = process.environ().get(MARK) == self._mark
        return self._known[key]

    def sample(self) -> None:
        """Look once, and keep what is more than before."""
        rss = pss = count = 0
        for process in self.processes():
            with contextlib.suppress(*_GONE):
                found = process.memory_full_info()
                rss, pss, count = rss + found.rss, pss + found.pss, count + 1
        if rss > self.peak.rss_bytes:
            self.peak = TreePeak(rss_bytes=rss, pss_bytes=pss, processes=count)

    def watch(self) -> threading.Thread:
        """Sample until `ended`, in a thread."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        return thread

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_EVERY_S):
            self.sample()

    def ended(self) -> None:
        """The command is over: wait for its daemons, and end those that stay."""
        self._over.set()
        until = time.monotonic() + self._patience_s
        while (left := self.processes()) and time.monotonic() < until:
            time.sleep(0.1)
        for process in left:
            with contextlib.suppress(*_GONE):
                process.kill()
        while self.processes():
            time.sleep(0.01)
