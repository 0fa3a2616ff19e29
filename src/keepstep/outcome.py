"""Waiting for another thread, in a way that Ctrl-C can end at any instant without harm.

Two things go wrong with an `Event`, a `Condition` or a `Future`, all of which are Python code around a lock:

* A signal is only noted at first; its handler runs once the main thread executes Python again. One that
  comes while that thread is about to sleep, but does not yet, wakes nobody: the sleep goes on until what is
  waited for has come. On a busy machine that moment is long, as another thread has to take over first.
* The handler may raise just after such an object has taken its lock, and nobody gives the lock back. Whoever
  is waited for can never say that it is done, and the process never exits.

Here nobody sleeps for longer than `LOOK_UP_S`, and whoever is waited for takes no lock that a waiter holds.
"""

from __future__ import annotations

import contextlib
import math
import queue
import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

__all__ = ["LOOK_UP_S", "Bell", "Latch", "Outcome", "wait_for_all"]

LOOK_UP_S = 0.2
"""So long a signal may go unnoticed."""

_T = TypeVar("_T")


class Latch:
    """Shut until a thread opens it, for good; any number of threads may open it, and wait."""

    def __init__(self) -> None:
        self._is_open = False
        self._opened: queue.SimpleQueue[None] = queue.SimpleQueue()  # C: entered and left in one instruction

    @property
    def is_open(self) -> bool:
        """Whether it was opened."""
        return self._is_open

    def open(self) -> None:
        """Let everybody through."""
        self._is_open = True
        self._opened.put(None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return once it is open, or after so many seconds; whether it is open."""
        ends_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        # The queue only makes it quick. Whoever is interrupted with what it held costs the others a while.
        while not self._is_open:
            left_s = min(LOOK_UP_S, ends_s - time.monotonic())
            if left_s <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                self._opened.get(timeout=left_s)
                self._opened.put(None)
        return True


class Bell:
    """Rung whenever something has changed, so that those who wait for it look again.

    What changes is guarded by a lock of its own, and `ring` is called with that lock held. To wait: look, and
    take `next_ring`, with the lock held; give the lock back; wait for the latch, for `LOOK_UP_S` at most, as
    whoever rings may be interrupted too; begin again.
    """

    def __init__(self) -> None:
        self._next = Latch()

    @property
    def next_ring(self) -> Latch:
        """Open once it has rung."""
        return self._next

    def ring(self) -> None:
        """Let all who wait look."""
        rung, self._next = self._next, Latch()
        rung.open()


class Outcome(Generic[_T]):
    """What a piece of work came to: its result or its error, told by the thread that does it."""

    def __init__(self) -> None:
        self._latch = Latch()
        self._result: _T | None = None
        self._error: BaseException | None = None
        self._settled = False
        self._then: Callable[[BaseException | None], None] | None = None

    def settle(self, work: Callable[[], _T]) -> None:
        """Do the work, and tell."""
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001  (it belongs to whoever asks for the result)
            self._error = error
        self._settled = True
        if self._then is not None:
            self._then(self._error)
        self._latch.open()

    def before_it_is_told(self, then: Callable[[BaseException | None], None]) -> None:
        """Have the error (None: there is none) told to `then` before any wait is over.

        Call it before anybody waits. `then` may be called twice, once from either thread.
        """
        self._then = then
        if self._settled:
            then(self._error)

    def done(self) -> bool:
        """Whether it is told."""
        return self._latch.is_open

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return once it is told, or after so many seconds; whether it is told."""
        return self._latch.wait(timeout_s)

    def error(self) -> BaseException | None:
        """Wait; the error, None if there is none."""
        self._latch.wait()
        return self._error

    def result(self) -> _T:
        """Wait; the result, or the error is raised."""
        self._latch.wait()
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the error refers to this frame
        return cast(_T, self._result)


def wait_for_all(outcomes: Iterable[Outcome[Any]]) -> None:
    """Return once all are told, whatever they came to."""
    for outcome in outcomes:
        outcome.wait()
