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

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, cast

__all__ = ["LOOK_UP_S", "Latch", "Outcome", "wait_for_all"]

LOOK_UP_S = 0.2
"""So long a signal may go unnoticed."""

_T = TypeVar("_T")


class Latch:
    """Shut until one thread opens it, for good; any number of threads may wait."""

    def __init__(self) -> None:
        self._is_open = False
        self._shut = threading.Lock()
        self._shut.acquire()

    @property
    def is_open(self) -> bool:
        """Whether it was opened."""
        return self._is_open

    def open(self) -> None:
        """Let everybody through; only the one thread whose latch it is calls this, once."""
        self._is_open = True
        self._shut.release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return once it is open, or after so many seconds; whether it is open."""
        ends_s = math.inf if timeout_s is None else time.monotonic() + timeout_s
        # The lock only makes it quick. Whoever is interrupted holding it costs the others a while.
        while not self._is_open:
            left_s = min(LOOK_UP_S, ends_s - time.monotonic())
            if left_s <= 0:
                return False
            if self._shut.acquire(timeout=left_s):
                self._shut.release()
        return True


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
