"""Before ranks do something together, each says what it is about to do.

A roll call is one small all-gather over gloo, on the CPU: a frame with a digest of the call (its name, and
the places, dtypes and shapes of its tensors) and, if there is little of it, the data itself. Frames that
differ are told in words on every rank at once, instead of hanging or mixing up data; a rank that does not
come, or whose process ended, is named.

It has a process group of its own, so nothing that the script or DDP sends can come in between.
"""

from __future__ import annotations

import datetime as dt
import json
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed import distributed_c10d

from keepstep.errors import CollectiveMismatchError, RankFailedError, RankMissingError
from keepstep.meetings import LOOK_EVERY_S, Turns
from keepstep.world.inquiry import Inquiry, Witness
from keepstep.world.standstill import Lookout
from keepstep.world.whereabouts import line_of_caller

__all__ = ["NotDoneError", "RollCall"]

_FRAME_BYTES = 512
_HEAD = struct.Struct("<?7xQ16s")
_INLINE_BYTES = _FRAME_BYTES - _HEAD.size
_MOST_LINES = 8


class NotDoneError(Exception):
    """Raised by a `prepare` to tell the other ranks that this one failed before it came."""


class RollCall:
    """All that the ranks over one store do together, one call after another.

    Attributes:
        lookout: sees whether ranks wait for each other in different places.

    Args:
        store: the store that the ranks found each other with.
        rank: this process.
        size: how many ranks there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._meeting_place = _client(store, "group")
        self._group: Any = None
        self._turns = Turns()
        self._count = 0
        self._last = "nothing yet"
        self._name = ""
        self._timeout_s = 0.0
        self._lost: RankMissingError | None = None
        interval_s = max(1.0, size / 200)  # all witnesses together ask the store 200 times a second at most
        self._witness = Witness(_client(store, "witness"), rank, size, interval_s)
        self.lookout = Lookout(_client(store, "witness"), self._witness.posture, rank, size)
        self._inquiry = Inquiry(
            _client(store, "witness"), self._witness, rank, size, patience_s=2 * interval_s + 1
        )

    def turn(self, name: str, prepare: Callable[[], tuple[str, bytes]], timeout_s: float) -> list[bytes]:
        """Call the roll.

        Args:
            name: what the ranks are about to do.
            prepare: gives what has to be equal on all ranks, a line for each tensor, and this rank's data.
                If it raises, the other ranks raise too.
            timeout_s: how long to wait for the other ranks, seconds.

        Returns:
            The data of each rank, by rank.

        Raises:
            CollectiveMismatchError: ranks are about to do different things, or wait for this one elsewhere.
            RankFailedError: another rank's `prepare` raised.
            RankMissingError: a rank did not come.
            UsageError: the handler of a signal calls it in the middle of another one.
        """
        with self._turns.take(name):
            if self._lost is not None:
                raise RankMissingError(
                    f"{name}: the ranks have lost each other before. {self._lost}",
                    ranks=self._lost.ranks,
                    waited_s=0.0,
                )
            self._count += 1
            failure: Exception | None = None
            try:
                signature, data = prepare()
            except Exception as error:  # noqa: BLE001  (raised below, when the others know)
                failure, signature, data = error, "", b""
            self._name, self._timeout_s = name, timeout_s
            return self._exchange(signature, data, failure)

    def run(self, name: str, start: Callable[[Any, dt.timedelta], Any], timeout_s: float) -> None:
        """Run a collective on the roll call's own group, right after `turn`.

        Args:
            name: what is done.
            start: begins it on the group, with a time-out, and returns torch's work.
            timeout_s: how long it may take, seconds.
        """
        with self._turns.take(name):
            self._name, self._timeout_s = name, timeout_s
            self._wait_for(lambda: start(self._group, dt.timedelta(seconds=timeout_s)))

    # ------------------------------------------------------------------------------------- one call

    def _exchange(self, signature: str, data: bytes, failure: Exception | None) -> list[bytes]:
        digest = xxhash.xxh3_128_digest(f"{self._name}\n{signature}".encode())
        head = _HEAD.pack(failure is not None, len(data), digest)
        inline = data if len(data) <= _INLINE_BYTES else b""
        frames = self._all_gather((head + inline).ljust(_FRAME_BYTES, b"\0"))
        heads = [_HEAD.unpack_from(frame) for frame in frames]
        if any(failed for failed, _, _ in heads) or len({digest for _, _, digest in heads}) > 1:
            self._raise_what_differs(signature, failure)
        self._last = f"{self._name} (call {self._count})"
        lengths = [length for _, length, _ in heads]
        if max(lengths) <= _INLINE_BYTES:
            return [
                frame[_HEAD.size : _HEAD.size + length] for frame, length in zip(frames, lengths, strict=True)
            ]
        return self._all_gather_of(data, lengths)

    def _raise_what_differs(self, signature: str, failure: Exception | None) -> None:
        told = json.dumps(
            {
                "name": self._name,
                "lines": signature.splitlines(),
                "where": line_of_caller(),
                "failure": None if failure is None else _told(failure)[:10_000],
            }
        ).encode()
        lengths = [int(length) for length in self._all_gather(str(len(told)).encode().ljust(16))]
        calls = [json.loads(data) for data in self._all_gather_of(told, lengths)]
        if failure is not None:
            raise failure
        for rank, call in enumerate(calls):
            if call["failure"] is not None:
                text = f"{self._name}: rank {rank} failed at {call['where']}: {call['failure']}"
                raise RankFailedError(text, rank=rank)
        raise CollectiveMismatchError(_difference(calls, self._count), calls=[_one_line(c) for c in calls])

    def _all_gather_of(self, data: bytes, lengths: Sequence[int]) -> list[bytes]:
        received = self._all_gather(data.ljust(max(lengths), b"\0"))
        return [part[:length] for part, length in zip(received, lengths, strict=True)]

    def _all_gather(self, data: bytes) -> list[bytes]:
        """Bytes of one length from all ranks."""
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        received = torch.empty((self.size, len(data)), dtype=torch.uint8)
        options = distributed_c10d.AllgatherOptions()  # type: ignore[attr-defined]
        options.timeout = dt.timedelta(seconds=self._timeout_s)
        self._wait_for(lambda: self._opened().allgather([list(received)], [sent], options))
        return [row.tobytes() for row in received.numpy()]

    def _opened(self) -> Any:
        """The process group, made at the first call."""
        if self._group is None:
            timeout = dt.timedelta(seconds=self._timeout_s)
            self._group = dist.ProcessGroupGloo(self._meeting_place, self.rank, self.size, timeout=timeout)
        return self._group

    def _wait_for(self, start: Callable[[], Any]) -> None:
        try:
            work = start()
            with self.lookout.waiting(self._name):
                while not _is_over(work):
                    self._look()
        except RuntimeError as error:
            self._lost = self._who_is_missing(str(error))
            raise self._lost from None

    def _look(self) -> None:
        try:
            self.lookout.look(f"{self._name} (call {self._count})")
        except CollectiveMismatchError as error:
            others = [rank for rank in range(self.size) if rank != self.rank]
            self._lost = RankMissingError(str(error), ranks=others, waited_s=self._timeout_s)
            raise

    # ------------------------------------------------------------------------------------ who is missing

    def _who_is_missing(self, reason: str) -> RankMissingError:
        timed_out = "timed out" in reason.lower() or "timeout" in reason.lower()
        call = f"{self._name} (call {self._count}, {line_of_caller()})"
        return self._inquiry.verdict(call, self._last, self._timeout_s, timed_out=timed_out)


def _is_over(work: Any) -> bool:
    """Wait for a while; whether it came to its end, which raises what it failed with."""
    try:
        work.wait(dt.timedelta(seconds=LOOK_EVERY_S))
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


def _client(store: Any, name: str) -> Any:
    """A client of its own: a wait in one client blocks all else that is asked of it."""
    return distributed_c10d.PrefixStore(f"keepstep/roll/{name}", store.clone())


# ----------------------------------------------------------------------------------------- in words


def _told(failure: Exception) -> str:
    return str(failure) if isinstance(failure, NotDoneError) else f"{type(failure).__name__}: {failure}"


def _difference(calls: list[dict[str, Any]], count: int) -> str:
    if len({call["name"] for call in calls}) > 1:
        groups = _grouped([f"{call['name']}, at {call['where']}" for call in calls])
        return (
            f"ranks called different things (call {count}):\n{groups}\nEvery rank makes the same calls in "
            "the same order: look for one that only some ranks reach, as under `if is_main_process`"
        )
    name = calls[0]["name"]
    common = set.intersection(*(set(call["lines"]) for call in calls))
    groups = _grouped([_tensors([x for x in call["lines"] if x not in common], call) for call in calls])
    advice = {
        "gather": "Bring tensors to one size with pad_across_processes() first, or gather them as objects "
        "with gather_object()",
    }.get(name, "Give it the same tensors, of one shape and dtype, on every rank")
    return f"{name}: what the ranks gave it differs (call {count}):\n{groups}\n{advice}"


def _tensors(lines: list[str], call: dict[str, Any]) -> str:
    shown = lines[:_MOST_LINES] + (
        [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    )
    return f"{'; '.join(shown) or 'nothing beyond that'}, at {call['where']}"


def _one_line(call: dict[str, Any]) -> str:
    return f"{call['name']}({'; '.join(call['lines'])})"


def _grouped(texts: list[str]) -> str:
    """One line for all ranks that say the same."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return "\n".join(
        f"  rank{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}: {text}"
        for text, group in ranks.items()
    )
