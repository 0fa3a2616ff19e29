"""Ranks that meet in a key-value store: each says something, all hear it, or all hear why not.

One piece of common work is a `Meeting`. Every wait in it has a time-out that names the ranks that did not
come, and whoever leaves it by an exception tells the others, who then raise at once instead of waiting.
Keys are deleted once all ranks have come to a later meeting, so the store does not grow.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from keepstep.errors import RankError, RankFailedError, RankMissingError, UsageError
from keepstep.keystore import Connection, KeyValueStore

__all__ = ["LOOK_EVERY_S", "Alone", "Meeting", "Topic", "Turns", "Watch", "amid_another"]

LOOK_EVERY_S = 5.0
"""How long a rank waits before it looks what the others do, and again before it looks anew."""

_ASKED_A_WAIT, _SHORTEST_S, _LONGEST_S = 20, 0.001, 0.5
"""A rank that looks after the others asks for a key this often in a wait, by these pauses."""
_PART_BYTES = 4 << 20
"""PyTorch's TCP store refuses values of more than 8 MiB."""
_MOST_STEPS = 8
"""Steps that a meeting may have; who fails marks them all."""


def amid_another(what: str) -> UsageError:
    """What to raise of a call that ranks can't make together, as this one is in the middle of another."""
    return UsageError(
        f"{what}: it was called in the middle of another call that ranks make together, by the handler of a "
        "signal: ranks can't meet for it, as they meet already. Let the handler take note of the signal, and "
        "make the call when the loop comes by"
    )


class Turns:
    """What ranks do together on one thread after the other."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._taken = False

    @contextlib.contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Wait for the turns of other threads.

        Raises:
            UsageError: this thread is in the middle of one: the handler of a signal asks.
        """
        with self._lock:
            if self._taken:
                raise amid_another(what)
            self._taken = True
            try:
                yield
            finally:
                self._taken = False


class Meeting(Protocol):
    """One piece of work that all ranks do together; every rank takes the same steps in the same order."""

    def exchange(self, value: bytes) -> list[bytes]:
        """Every rank's value, by rank, on every rank."""
        ...

    def collect(self, value: bytes) -> list[bytes]:
        """Every rank's value, by rank, on rank 0; other ranks go on at once, with an empty list."""
        ...

    def broadcast(self, value: bytes) -> bytes:
        """Rank 0's value on every rank; rank 0 goes on at once."""
        ...

    def scatter(self, values: Sequence[bytes]) -> bytes:
        """The value that rank 0 has for this rank; rank 0 goes on at once."""
        ...

    def check(self) -> None:
        """Raise if another rank has failed by now."""
        ...


class Watch(Protocol):
    """Looks after the other ranks while this one waits for them."""

    def waiting(self, call: str) -> contextlib.AbstractContextManager[None]:
        """This rank waits in a call meanwhile."""
        ...

    def look(self, call: str) -> None:
        """Raise if the others can't come."""
        ...


class Alone:
    """A meeting of one."""

    def exchange(self, value: bytes) -> list[bytes]:
        return [value]

    def collect(self, value: bytes) -> list[bytes]:
        return [value]

    def broadcast(self, value: bytes) -> bytes:
        return value

    def scatter(self, values: Sequence[bytes]) -> bytes:
        return values[0]

    def check(self) -> None:
        """There is no other rank."""


class Topic:
    """Meetings over one topic, numbered. A rank that others gave up waiting for goes on with the next one.

    A meeting must hold a step to which all ranks come (`exchange` or `collect`).

    Args:
        store: where ranks meet; its keys are this topic's alone.
        topic: what the meetings are about, for messages.
        rank: this process.
        size: how many ranks there are.
    """

    def __init__(self, store: KeyValueStore, topic: str, rank: int, size: int) -> None:
        self.store = Connection(store, topic)
        self.topic = topic
        self.rank = rank
        self.size = size
        self._last = 0
        self._turn = threading.Lock()  # another thread may end a meeting than the one that began it
        self._old_keys: list[str] = []

    @contextlib.contextmanager
    def meeting(self, timeout_s: float, watch: Watch | None = None) -> Iterator[Meeting]:
        """Hold one; see `keepstep.world.World.meeting`.

        Args:
            timeout_s: how long a step waits for the other ranks.
            watch: looks after them meanwhile.
        """
        with self._turn:
            self.store.timeout_s = timeout_s
            number = self._last + 1
            while self._was_missed(number):
                number += 1
            self._last = number
            meeting = _StoreMeeting(self, number, timeout_s, watch)
            try:
                meeting.open()
                yield meeting
            except BaseException as error:
                meeting.fail(error)
                self._old_keys += meeting.keys
                raise
            self._forget()  # all ranks came to this meeting, so they have left those before
            self._old_keys = meeting.keys

    def _was_missed(self, number: int) -> bool:
        """Whether the others gave a meeting up since this rank did not come."""
        if not self.store.check(f"{number}/failed"):
            return False
        return self.rank in json.loads(self.store.get(f"{number}/failed")).get("missing", ())

    def _forget(self) -> None:
        for key in self._old_keys:
            self.store.delete(key)
        self._old_keys = []

    def missing(self, ranks: Sequence[int], waited_s: float) -> RankMissingError:
        """The error that names the ranks that did not come."""
        shown = ", ".join(map(str, ranks[:20]))
        more = f" and {len(ranks) - 20} more" if len(ranks) > 20 else ""
        return RankMissingError(
            f"{self.topic}: {len(ranks)} of {self.size} ranks did not come within {waited_s:g} s: rank "
            f"{shown}{more}. They died, hang, or took another way through the program: look at their logs. "
            "If they are only slow, give Ranks(timeout_s=...) more time",
            ranks=ranks,
            waited_s=waited_s,
        )


class _StoreMeeting:
    """A `Meeting` in a key-value store.

    Each step has a key `done` that is waited for: set to nothing by the last to come, or to its reason by
    the first to fail.
    """

    def __init__(self, topic: Topic, number: int, timeout_s: float, watch: Watch | None) -> None:
        self._watch = watch
        self._topic = topic
        self._store = topic.store
        self._number = number
        self._timeout_s = timeout_s
        self._step = 0
        self._all_come = 0
        self.keys: list[str] = []

    def open(self) -> None:
        """Rank 0 opens the meeting, the others wait for that."""
        if self._topic.rank == 0:
            self._store.set(self._made("open"), "")
        elif not self._came(f"{self._number}/open"):
            raise self._topic.missing([0], self._timeout_s)

    def exchange(self, value: bytes) -> list[bytes]:
        step = self._all_come = self._next_step()
        self._come(step, value)
        self._wait(step, range(self._topic.size))
        return [self._get(f"{step}/{rank}") for rank in range(self._topic.size)]

    def collect(self, value: bytes) -> list[bytes]:
        step = self._all_come = self._next_step()
        self._come(step, value)
        if self._topic.rank:
            return []
        self._wait(step, range(self._topic.size))
        return [self._get(f"{step}/{rank}") for rank in range(self._topic.size)]

    def broadcast(self, value: bytes) -> bytes:
        step = self._next_step()
        if self._topic.rank:
            self._wait(step, [0])
            return self._get(f"{step}/0")
        self._put(f"{step}/0", value)
        self._store.set_once(self._made(f"{step}/done"), "{}")
        return value

    def scatter(self, values: Sequence[bytes]) -> bytes:
        step = self._next_step()
        if self._topic.rank:
            self._wait(step, [0])
            return self._get(f"{step}/{self._topic.rank}")
        for rank, value in enumerate(values):
            self._put(f"{step}/{rank}", value)
        self._store.set_once(self._made(f"{step}/done"), "{}")
        return values[0]

    def check(self) -> None:
        if self._store.check(f"{self._number}/failed"):
            self._raise(json.loads(self._store.get(f"{self._number}/failed")))

    def fail(self, error: BaseException) -> None:
        """Tell the others; whatever step they are in, they raise."""
        rank = error.rank if isinstance(error, RankFailedError) else self._topic.rank
        text = str(error) if isinstance(error, RankError) else f"{type(error).__name__}: {error}"
        kind = error.kind if isinstance(error, RankFailedError) else type(error).__name__
        news: dict[str, Any] = {"rank": rank, "message": text[:10_000], "kind": kind}
        if isinstance(error, RankMissingError):
            news["missing"] = list(error.ranks)
        with contextlib.suppress(RankMissingError):  # no store, nobody to tell
            self._store.set_once(self._made("failed"), json.dumps(news))
            self._store.set_once(self._made("open"), "")  # or some would wait for that
            for step in range(max(self._step, 1), _MOST_STEPS + 1):
                self._store.set_once(self._made(f"{step}/done"), json.dumps(news))

    # ----------------------------------------------------------------------------------- one step

    def _next_step(self) -> int:
        self._step += 1
        assert self._step <= _MOST_STEPS, "more steps than a failing rank would mark"
        return self._step

    def _come(self, step: int, value: bytes) -> None:
        self._put(f"{step}/{self._topic.rank}", value)
        if self._store.add(self._shared(f"{step}/count"), 1) == self._topic.size:
            self._store.set_once(self._shared(f"{step}/done"), "{}")

    def _wait(self, step: int, for_ranks: Sequence[int]) -> None:
        done = self._shared(f"{step}/done")
        if not self._came(done):
            missing = self._absent(step, for_ranks)
            if missing == [0] and self._all_come:  # rank 0 may be waiting for another one itself
                missing = self._absent(self._all_come, range(self._topic.size)) or missing
            if missing:
                raise self._topic.missing(missing, self._timeout_s)
        self._raise(json.loads(self._store.get(done)))

    def _came(self, key: str) -> bool:
        """Wait for a key; whether it came in time."""
        if self._watch is None:
            return self._store.wait(key, self._timeout_s)
        began_s = looked_s = time.monotonic()
        with self._watch.waiting(self._topic.topic):
            while not self._store.check(key):
                now_s = time.monotonic()
                if now_s - began_s >= self._timeout_s:
                    return False
                if now_s - looked_s >= LOOK_EVERY_S:
                    looked_s = now_s
                    self._watch.look(self._topic.topic)
                time.sleep(min(max((now_s - began_s) / _ASKED_A_WAIT, _SHORTEST_S), _LONGEST_S))
        return True

    def _absent(self, step: int, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if not self._store.check(f"{self._number}/{step}/{rank}")]

    def _raise(self, news: dict[str, Any]) -> None:
        """Raise what another rank told, if it is bad news."""
        if "missing" in news:
            text = f"given up by rank {news['rank']}. {news['message']}"
            raise RankMissingError(text, ranks=news["missing"], waited_s=self._timeout_s)
        if news:
            told = news["message"]
            text = (
                told
                if told.startswith(f"rank {news['rank']} failed")
                else f"rank {news['rank']} failed: {told}"
            )
            raise RankFailedError(text, rank=news["rank"], kind=news["kind"])

    # --------------------------------------------------------------------------------------- keys

    def _made(self, name: str) -> str:
        """A key that this rank makes, and deletes when its time is over."""
        key = f"{self._number}/{name}"
        self.keys.append(key)
        return key

    def _shared(self, name: str) -> str:
        """A key that any rank may make; rank 0 deletes it."""
        return self._made(name) if self._topic.rank == 0 else f"{self._number}/{name}"

    def _put(self, name: str, value: bytes) -> None:
        """Large values in parts; the head comes last, and says how many parts there are."""
        parts = range(0, len(value), _PART_BYTES)
        for index, begin in enumerate(parts):
            self._store.set(self._made(f"{name}/{index}"), value[begin : begin + _PART_BYTES])
        self._store.set(self._made(name), str(len(parts)))

    def _get(self, name: str) -> bytes:
        count = int(self._store.get(f"{self._number}/{name}"))
        return b"".join(self._store.get(f"{self._number}/{name}/{index}") for index in range(count))
