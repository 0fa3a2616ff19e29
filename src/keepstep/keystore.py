"""A key-value store whose loss is told in words, and whose silence ends."""

from __future__ import annotations

import contextlib
import datetime as dt
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from keepstep.errors import RankMissingError
from keepstep.outcome import Outcome

__all__ = ["Connection", "KeyValueStore"]

_T = TypeVar("_T")

_ANSWER_S = 20.0
"""How long a store may take to answer, at least: a tenth of the meeting's time-out if that is more."""

_WAIT_S: Final = 1.0
"""A store that waits for a key hears nothing else meanwhile: it is asked to wait for so long at a time, and
a rank that is interrupted gets to tell the others that it leaves."""


class KeyValueStore(Protocol):
    """What meetings ask of a store; `torch.distributed.Store` does all of it, raising RuntimeErrors."""

    def set(self, key: str, value: Any, /) -> object:
        """Set a value, str or bytes."""

    def get(self, key: str, /) -> bytes:
        """A value that is there."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to a counter; its new value."""

    def compare_set(self, key: str, expected: str, value: str, /) -> bytes:
        """Set a value that is not there yet, if `expected` is empty."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""

    def wait(self, keys: list[str], timeout: dt.timedelta, /) -> object:
        """Wait until all keys are there."""

    def delete_key(self, key: str, /) -> bool:
        """Delete a key; whether it was there."""


class Connection:
    """A store whose loss is told in words, and whose silence ends.

    A client waits for ever for a server that is stopped or cut off, also where it was given a time-out. So
    it is asked on a thread of its own, which is left behind if no answer comes.
    """

    def __init__(self, store: KeyValueStore, topic: str) -> None:
        self._store = store
        self._topic = topic
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._asked: Outcome[Any] | None = None
        self.timeout_s = 0.0

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(lambda: self._store.set(key, value))

    def set_once(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.compare_set(key, "", value))

    def get(self, key: str) -> bytes:
        return self._ask(lambda: self._store.get(key))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._store.add(key, amount))

    def check(self, key: str) -> bool:
        return self._ask(lambda: self._store.check([key]))

    def delete(self, key: str) -> None:
        with contextlib.suppress(RankMissingError):  # the store went first, and all that was in it
            self._ask(lambda: self._store.delete_key(key))

    def wait(self, key: str, timeout_s: float) -> bool:
        """Whether the key came within the time-out."""
        ends_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.001, ends_s - time.monotonic())
            if self._ask(partial(self._wait_for, key, min(_WAIT_S, left_s)), left_s):
                return True
            if time.monotonic() >= ends_s:
                return False

    def _wait_for(self, key: str, wait_s: float) -> bool:
        try:
            self._store.wait([key], dt.timedelta(seconds=wait_s))
        except RuntimeError:  # too late, or no connection, which the check will tell
            return self._store.check([key])
        return True

    def _ask(self, work: Callable[[], _T], may_wait_s: float = 0.0) -> _T:
        """Ask the store; no answer within the time-out is told as its loss."""
        if self._asked is not None and not self._asked.wait(_WAIT_S + 1.0):  # it was left by Ctrl-C
            raise self._lost("it has not answered yet", 0.0)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._serve, name="keepstep-meet", daemon=True)
            self._thread.start()
        answer: Outcome[_T] = Outcome()
        self._work.put(lambda: answer.settle(work))
        self._asked = answer  # last: else Ctrl-C might leave it without an answer
        limit_s = may_wait_s + max(_ANSWER_S, self.timeout_s / 10)
        if not answer.wait(limit_s):
            raise self._lost("it does not answer", limit_s)
        try:
            return answer.result()
        except RuntimeError as error:
            raise self._lost(str(error).splitlines()[0], 0.0) from error

    def _serve(self) -> None:
        while True:
            self._work.get()()

    def _lost(self, why: str, waited_s: float) -> RankMissingError:
        return RankMissingError(
            f"{self._topic}: the store over which ranks meet can't be reached ({why}). The process that "
            "serves it, rank 0 or the launcher, is gone, stopped or cut off: start the run again",
            ranks=[0],
            waited_s=waited_s,
        )
