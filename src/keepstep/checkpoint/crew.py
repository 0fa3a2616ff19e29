"""The threads of one save or load."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from keepstep.errors import NoThreadError
from keepstep.outcome import LOOK_UP_S, Outcome, wait_for_all

__all__ = ["Crew", "in_threads"]

_NICER_BY = 5
"""About a third of what a thread of the training gets. With 10 the copy comes too late; see decision 0009."""

_T = TypeVar("_T")


class Crew:
    """Threads that are started as work comes, and end when they are told that no more does.

    An executor takes no work once the interpreter exits, and a save that copies in the background would be
    cut off there. These threads the interpreter waits for: whoever hands in work must come to close the crew.

    Args:
        count: how many at most; with one, work is done in the order in which it is handed in.
        name: of the threads.
        daemon: whether the interpreter does not wait for them after all.
    """

    def __init__(self, count: int, name: str, *, daemon: bool = False) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._count = count
        self._name = name
        self._daemon = daemon
        self._starting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closed = False
        self._niceness: int | None = None

    def step_back(self) -> None:
        """Let the training go first from here on, where threads have priorities of their own (Linux).

        Its threads wait for each other: one that loses its core to a save holds up all of them. Work done in
        the gaps that they leave holds up none. Called by a thread of the training, which may be nice itself.
        """
        with contextlib.suppress(OSError):
            mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            self._niceness = mine + _NICER_BY

    def submit(self, work: Callable[[], _T]) -> Outcome[_T]:
        """Hand in work; it is begun in the order in which it came.

        Raises:
            NoThreadError: the system gives no more threads; the work was not handed in.
        """
        with self._starting:
            if len(self._threads) < self._count and not self._closed:
                self._start_one()
        outcome: Outcome[_T] = Outcome()
        self._work.put(lambda: outcome.settle(work))
        return outcome

    def _start_one(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._run, name=name, daemon=self._daemon)
        self._threads.append(thread)  # first: Ctrl-C may come just after it has started
        try:
            thread.start()
        except RuntimeError as error:  # it has not: nobody would do what is handed in next
            self._threads.remove(thread)
            raise NoThreadError(
                f"{error}, which saving and loading need. Raise the limit on threads and processes "
                "(ulimit -u, the pids of a container) or on memory, or start fewer of them"
            ) from error

    def close(self) -> None:
        """Let the threads end once all that was handed in is done. Safe to call twice."""
        with self._starting:
            if not self._closed:
                for _ in self._threads:
                    self._work.put(None)
            self._closed = True

    def wait(self) -> None:
        """Return once the threads have ended; `close` comes first."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(LOOK_UP_S)  # a signal may not wake us

    def _run(self) -> None:
        in_front = True
        while (work := self._work.get()) is not None:
            if in_front and self._niceness is not None:
                in_front = False
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
            work()
            del work  # what it refers to is not ours while we wait


def in_threads(
    work: Callable[[], None], count: int, *, name: str, stop: Callable[[], None], daemon: bool = False
) -> list[BaseException]:
    """Do the same work in several threads, and return once all have ended.

    Args:
        work: takes what is left to do until nothing is.
        count: of threads.
        name: of the threads.
        stop: makes all of them return soon. Called if this thread is interrupted, or gets too few threads.
        daemon: whether the process may end without them: what they do is begun anew by the next one.

    Returns:
        What they raised.
    """
    crew = Crew(count, name, daemon=daemon)
    outcomes: list[Outcome[None]] = []
    try:
        for _ in range(count):
            outcomes.append(crew.submit(work))  # noqa: PERF401  (if one is refused, the others count)
        crew.close()
        wait_for_all(outcomes)
    except BaseException:
        stop()
        crew.close()
        crew.wait()
        raise
    return [error for outcome in outcomes if (error := outcome.error()) is not None]
