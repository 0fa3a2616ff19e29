"""Ranks that wait for each other in different places: found out within seconds, not at the time-out.

A rank that has fewer batches than the others goes on, and waits in the next call that all ranks make
together. The others wait for its gradients, in a backward. Neither can come. The rank that waits in the call
finds that out: it asks the witnesses of the others (`inquiry.py`) what their ranks do.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from keepstep.errors import CollectiveMismatchError, RankMissingError
from keepstep.keystore import Connection, KeyValueStore
from keepstep.meetings import LOOK_EVERY_S
from keepstep.world.whereabouts import line_of_caller

__all__ = ["Backwards", "Lookout", "Posture", "backwards"]

_STANDS_S = 5.0
"""How long a backward has to stand still to be one that waits for other ranks."""
_PAUSE_S = 0.05
_MOST_LINES = 16
_BACKWARD = "a backward, for the gradients of the others"
_IDLE = 0.1
"""The part of the time that a thread may compute and still be one that waits."""


@dataclass
class Backwards:
    """The backward passes of this process in which ranks may exchange gradients.

    Attributes:
        begun: how many.
        inside: one of them is under way.
    """

    begun: int = 0
    inside: bool = False


backwards = Backwards()
"""Of this process; told by whoever runs them."""


class Posture:
    """What the main thread of this process does, looked at now and then from another thread.

    Attributes:
        waits_in: the call of all ranks in which it waits for them; empty if it waits in none.
        waits_since_s: since when.
    """

    def __init__(self) -> None:
        self.waits_in = ""
        self.waits_since_s = 0.0
        self._before = (0, 0.0, 0.0)
        self._stands_since: float | None = None
        self._looks = 0

    def look(self) -> dict[str, Any]:
        """As plain values: in which call it waits, or for how long it has stood still in which backward."""
        main = threading.main_thread().ident or 0
        number, now_s, spent_s = backwards.begun, time.monotonic(), _cpu_s(main)
        old_number, old_now_s, old_spent_s = self._before
        idle = spent_s - old_spent_s <= _IDLE * (now_s - old_now_s)
        self._before = (number, now_s, spent_s)
        if not (backwards.inside and idle and number == old_number):
            self._stands_since = None
        elif self._stands_since is None:
            self._stands_since = old_now_s
        self._looks += 1
        return {
            "number": self._looks,
            "waits_in": self.waits_in,
            "waits_s": now_s - self.waits_since_s,
            "stands_s": 0.0 if self._stands_since is None else now_s - self._stands_since,
            "backwards": number,
        }


def _cpu_s(thread: int) -> float:
    """What a thread has computed so far, seconds; the time that has gone by, where that can't be told."""
    clock_of = getattr(time, "pthread_getcpuclockid", None)
    return time.monotonic() if clock_of is None else time.clock_gettime(clock_of(thread))


class Lookout:
    """Looks, while this rank waits for the others, whether they wait for it.

    Args:
        store: shared with the witnesses of all ranks.
        posture: of this process.
        rank: this process.
        size: how many ranks there are.
    """

    def __init__(self, store: KeyValueStore, posture: Posture, rank: int, size: int) -> None:
        self._store = Connection(store, "looking what other ranks do")
        self._posture = posture
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._seen: dict[int, int] = {}

    @contextlib.contextmanager
    def waiting(self, call: str) -> Iterator[None]:
        """Tell that the main thread waits in a call of all ranks meanwhile."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._seen.clear()
        self._posture.waits_in, self._posture.waits_since_s = call, time.monotonic()
        try:
            yield
        finally:
            self._posture.waits_in = ""

    def look(self, call: str) -> None:
        """Ask what the others do.

        Raises:
            CollectiveMismatchError: they can't come, as they wait for the gradients of this rank.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        with contextlib.suppress(RankMissingError):  # what waits finds that out by itself
            self._store.set("posture/asked", "")
            if not self._store.check("posture/found"):
                standing = self._standing()
                if not any(standing.values()):
                    return
                found = _in_words(f"{call}, at {line_of_caller()}", self._rank, standing)
                self._store.set_once("posture/found", json.dumps(found))
            found = json.loads(self._store.get("posture/found"))
            self._leave_together(found["waiting"])
            raise CollectiveMismatchError(found["message"], calls=found["calls"])

    def _leave_together(self, waiting: int) -> None:
        """Let the others that wait in a call hear of it as well: the end of this rank is less of a reason."""
        heard = self._store.add("posture/heard", 1)
        end_s = time.monotonic() + LOOK_EVERY_S + 1
        while heard < waiting and time.monotonic() < end_s:
            time.sleep(_PAUSE_S)
            heard = self._store.add("posture/heard", 0)

    def _standing(self) -> dict[int, str]:
        """Where each of the others waits, if all do and none can come; "" for the same call as this rank."""
        standing = {}
        for number, rank in enumerate(self._others):
            told = self._told(rank)
            if told.get("stands_s", 0.0) >= _STANDS_S and told["backwards"] > backwards.begun:
                standing[rank] = f"{_BACKWARD}, at {told['where']}"
            elif told.get("waits_in") == self._posture.waits_in:
                standing[rank] = ""
            elif told.get("waits_in") and told["waits_s"] >= _STANDS_S:
                standing[rank] = f"{told['waits_in']}, at {told['where']}"
            else:
                self._others.insert(0, self._others.pop(number))  # the first to ask next time
                return {}
        return standing

    def _told(self, rank: int) -> dict[str, Any]:
        """What a rank told since this one waits: what it told first may be older."""
        key = f"posture/{rank}"
        if not self._store.check(key):
            return {}
        told: dict[str, Any] = json.loads(self._store.get(key))
        return told if told["number"] > self._seen.setdefault(rank, told["number"]) else {}


def _in_words(call: str, rank: int, standing: dict[int, str]) -> dict[str, Any]:
    """What there is to say: the message, what each rank called, how many of them can hear it."""
    calls = [call if place == "" else place for _, place in sorted({**standing, rank: call}.items())]
    places = "\n".join(f"  rank {number}: {place}" for number, place in list(enumerate(calls))[:_MOST_LINES])
    return {
        "message": (
            "ranks wait for each other in different places, so none of them can go on:\n"
            f"{places}\nEvery rank makes the same calls in the same order. If they have different numbers of "
            "batches, as with even_batches=False: give them equally many (even_batches=True), or run the "
            "loop inside accelerator.join_uneven_inputs([model])"
        ),
        "calls": calls,
        "waiting": sum(not place.startswith(_BACKWARD) for place in calls),
    }
