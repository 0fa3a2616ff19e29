"""Who is missing, and where: asked once, when a call that all ranks make together has come to nothing.

Each rank has a witness, a thread that looks into the key-value store now and then. When it is asked there,
it tells at which line of the script its rank is, so that a rank that waits, computes or hangs can be told
from one that is gone.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from typing import Any

from keepstep.errors import RankMissingError
from keepstep.keystore import Connection, KeyValueStore
from keepstep.world.standstill import Posture
from keepstep.world.whereabouts import line_of_caller

__all__ = ["Inquiry", "Witness"]

_GOODBYE = b"goodbye"
_LOOK_S = 0.05
"""How often those who ask look for answers."""
_LAST_WORDS_S = 0.3
"""How long rank 0, which may serve the store, stays for the others to read the verdict."""


class Witness:
    """Tells, when asked, where this process's main thread is.

    Args:
        store: a client of its own, since it may wait for the server.
        rank: this process.
        size: how many ranks there are.
        interval_s: how often it looks whether it is asked, seconds.

    Attributes:
        verdict: what was found out when it was asked.
        posture: what the main thread does.
    """

    def __init__(self, store: KeyValueStore, rank: int, size: int, interval_s: float) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._interval_s = interval_s
        self.verdict: bytes | None = None
        self.posture = Posture()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keepstep-witness", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread, before the interpreter ends under it."""
        self._over.set()
        self._thread.join(2 * self._interval_s)
        atexit.unregister(self.stop)

    def _watch(self) -> None:
        try:
            while not self._over.wait(self._interval_s):
                if self._store.check(["ask"]):
                    if self._store.get("ask") == _GOODBYE:
                        break
                    self._store.set(f"at/{self._rank}", self._answer())
                    self._hear_the_verdict()
                    return
                if self._store.check(["posture/asked"]):
                    told = {**self.posture.look(), "where": self._answer()}
                    self._store.set(f"posture/{self._rank}", json.dumps(told))
            self._leave()
        except RuntimeError:  # the store is gone, and nobody is left to ask
            return

    def _leave(self) -> None:
        """Rank 0, which may serve the store, goes last: clients complain of a server that is gone."""
        self._store.set(f"left/{self._rank}", "")
        if self._rank:
            return
        self._store.set("ask", _GOODBYE)
        end = time.monotonic() + 1.5 * self._interval_s
        others = [f"left/{rank}" for rank in range(1, self._size)]
        while not self._store.check(others) and time.monotonic() < end:
            time.sleep(_LOOK_S)

    def _hear_the_verdict(self) -> None:
        """Keep it: by the time this rank comes, who found it may have taken the store along."""
        while not self._store.check(["verdict"]):
            self._over.wait(_LOOK_S)
        self.verdict = self._store.get("verdict")

    @staticmethod
    def _answer() -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return "" if frame is None else line_of_caller(frame)


class Inquiry:
    """Finds out which ranks are missing; the first to find out tells the others.

    Args:
        store: shared with the witnesses of all ranks.
        witness: this process's.
        rank: this process.
        size: how many ranks there are.
        patience_s: how long witnesses may take to answer, seconds.
    """

    def __init__(
        self, store: KeyValueStore, witness: Witness, rank: int, size: int, patience_s: float
    ) -> None:
        self._store = Connection(store, "asking who is missing")
        self._witness = witness
        self._rank = rank
        self._size = size
        self._patience_s = patience_s

    def verdict(self, call: str, last: str, waited_s: float, *, timed_out: bool) -> RankMissingError:
        """The error that names the missing ranks, the same on all ranks.

        Args:
            call: what this rank wanted to do, and where.
            last: what all ranks last did together.
            waited_s: how long it waited.
            timed_out: whether it gave up, rather than lost a connection.
        """
        try:
            told = json.loads(self._witness.verdict or self._found_out(call, last, waited_s, timed_out))
        except RankMissingError as store_lost:
            return RankMissingError(f"{call}: {store_lost}", ranks=store_lost.ranks, waited_s=waited_s)
        if self._rank == 0:
            time.sleep(_LAST_WORDS_S)
        by = "" if told["by"] == self._rank else f"{call}: given up by rank {told['by']}. "
        return RankMissingError(by + told["message"], ranks=told["ranks"], waited_s=waited_s)

    def _found_out(self, call: str, last: str, waited_s: float, timed_out: bool) -> bytes:
        if not self._store.check("verdict"):
            self._store.set(f"came/{self._rank}", "")
            self._store.set("ask", "where")
            self._await_answers()
            found = self._found(call, last, waited_s, timed_out)
            self._store.set_once("verdict", json.dumps(found))
        return self._store.get("verdict")

    def _await_answers(self) -> None:
        end = time.monotonic() + self._patience_s
        ranks = set(range(self._size))
        while ranks and time.monotonic() < end and not self._store.check("verdict"):
            ranks = {r for r in ranks if not (self._has(f"came/{r}") or self._has(f"at/{r}"))}
            time.sleep(_LOOK_S)

    def _has(self, key: str) -> bool:
        return self._store.check(key)

    def _found(self, call: str, last: str, waited_s: float, timed_out: bool) -> dict[str, Any]:
        absent = [rank for rank in range(self._size) if not self._has(f"came/{rank}")]
        seen = {rank: self._store.get(f"at/{rank}").decode() for rank in absent if self._has(f"at/{rank}")}
        silent = [rank for rank in absent if rank not in seen]
        missing = absent if timed_out else silent or absent
        what = f"did not come within {waited_s:g} s" if timed_out else "ended, or can't be reached any more"
        lines = [f"{call}: {_ranks(missing)} {what}."]
        lines += [f"Rank {rank} is at {place}." for rank, place in list(seen.items())[:8]]
        if silent:
            lines.append(f"No answer from {_ranks(silent)}: died, stopped or cut off; look at the log there.")
        lines.append(f"What all ranks last did together: {last}.")
        if timed_out:
            lines.append("If a rank is only slow, give more time (`timeout_s`).")
        return {"message": " ".join(lines), "ranks": missing, "by": self._rank}


def _ranks(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:20])) + (
        f" and {len(numbers) - 20} more" if len(numbers) > 20 else ""
    )
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}"
