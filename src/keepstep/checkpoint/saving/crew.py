"""The threads of one save."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["Crew"]

_NICENESS = 5
"""About a third of what a thread of the training gets. With 10 the copy comes too late; see decision 0009."""

_T = TypeVar("_T")


class Crew:
    """Threads that are all started at once, and end when they are told that no more work comes.

    An executor takes no work once the interpreter exits, and a save that copies in the background would be
    cut off there. These threads the interpreter waits for.

    Args:
        count: how many; with one, work is done in the order in which it is handed in.
        name: of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{n}", daemon=False) for n in range(count)
        ]
        self._closed = False
        self._steps_back = False
        for thread in self._threads:
            thread.start()

    def step_back(self) -> None:
        """Let the training go first from here on, where threads have priorities of their own (Linux).

        Its threads wait for each other: one that loses its core to a save holds up all of them. Work done in
        the gaps that they leave holds up none.
        """
        self._steps_back = True

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Hand in work; it is begun in the order in which it came."""
        future: Future[_T] = Future()
        self._work.put(lambda: _settle(future, work))
        return future

    def close(self) -> None:
        """Let the threads end once all that was handed in is done. Safe to call twice."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._work.put(None)

    def _run(self) -> None:
        in_front = True
        while (work := self._work.get()) is not None:
            if in_front and self._steps_back:
                in_front = False
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            work()
            del work  # what it refers to is not ours while we wait


def _settle(future: Future[_T], work: Callable[[], _T]) -> None:
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001  (it belongs to whoever asks for the result)
        future.set_exception(error)
    else:
        future.set_result(result)
