"""The ranks of an initialized torch.distributed."""

from __future__ import annotations

import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from keepstep.errors import UsageError
from keepstep.meetings import Meeting, Topic
from keepstep.world.collectives import Collectives
from keepstep.world.mail import Mail
from keepstep.world.protocol import Parcel, Reduction, no_parcel
from keepstep.world.roll_call import NotDoneError, RollCall

__all__ = ["DEFAULT_TIMEOUT_S", "Ranks", "join_ranks", "joined_group", "leave_ranks"]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 600.0

_MOST_TIMEOUT_S = 1e8

_topics: weakref.WeakKeyDictionary[Any, dict[str, Topic]] = weakref.WeakKeyDictionary()
"""By the store that ranks meet in: meetings are numbered, so all worlds over one store count together."""
_roll_calls: weakref.WeakKeyDictionary[Any, RollCall] = weakref.WeakKeyDictionary()
"""By the same: calls follow each other."""
_guard = threading.RLock()


class Ranks:
    """The ranks of an initialized `torch.distributed`.

    Args:
        timeout_s: how long a rank waits for the others before it names the missing ones, seconds. It has
            to cover the difference between the fastest and the slowest rank, of a save for instance.
        local_rank: this process's number on its machine; None asks torch.distributed.
        local_size: how many processes run on this machine; None for all of them.
        store: where ranks meet; None for the store that the process group was made with.

    Raises:
        UsageError: no process group has been initialized, or the time-out is no number of seconds.
    """

    def __init__(
        self,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        local_rank: int | None = None,
        local_size: int | None = None,
        store: distributed_c10d.Store | None = None,
    ) -> None:
        if not dist.is_initialized():
            raise UsageError(
                "torch.distributed is not initialized, so there are no ranks to meet: call "
                "torch.distributed.init_process_group first, or use OneRank() in a single process"
            )
        if not 0 < timeout_s <= _MOST_TIMEOUT_S:
            raise UsageError(f"timeout_s is {timeout_s!r}; expected seconds, more than 0 and at most 10**8")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_rank = dist.get_node_local_rank(self.rank) if local_rank is None else local_rank
        self.local_size = self.size if local_size is None else local_size
        self.kind = "MULTI_GPU" if "nccl" in dist.get_backend() else "MULTI_CPU"
        self.timeout_s = timeout_s
        self._mail: Mail | None = None
        self._store: Any = distributed_c10d._get_default_store() if store is None else store

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    # --------------------------------------------------------------------------------- plain data

    @contextlib.contextmanager
    def meeting(
        self, topic: str, timeout_s: float | None = None, *, in_turn: bool = False
    ) -> Iterator[Meeting]:
        """See `World.meeting`.

        Raises:
            RankMissingError: naming the ranks that did not come within the time-out.
            RankFailedError: another rank left the meeting by an exception, whose text is in the message.
        """
        with _guard:
            topics = _topics.setdefault(self._store, {})
            if topic not in topics:
                # A client of its own: a wait in one client blocks all else that is asked of it.
                store = distributed_c10d.PrefixStore(f"keepstep/{topic}", self._store.clone())
                topics[topic] = Topic(store, topic, self.rank, self.size)
            place = topics[topic]
        watch = self._roll_call().lookout if in_turn else None
        with place.meeting(self.timeout_s if timeout_s is None else timeout_s, watch) as meeting:
            yield meeting

    def exchange(self, value: T, timeout_s: float | None = None, purpose: str = "exchange") -> list[T]:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        told = self._roll_call().turn(purpose, lambda: ("", json.dumps(value).encode()), limit_s)
        return [json.loads(data) for data in told]

    def exchange_bytes(self, make: Callable[[], bytes], purpose: str) -> list[bytes]:
        return self._roll_call().turn(purpose, lambda: ("", make()), self.timeout_s)

    def barrier(self, purpose: str = "wait_for_everyone", failure: BaseException | None = None) -> None:
        def prepare() -> tuple[str, bytes]:
            if failure is not None:
                raise NotDoneError(f"{type(failure).__name__}: {failure}")
            return "", b""

        with contextlib.suppress(NotDoneError):
            self._roll_call().turn(purpose, prepare, self.timeout_s)

    def broadcast(self, value: T, source: int = 0, purpose: str = "broadcast of plain data") -> T:
        def make() -> bytes:
            return json.dumps(value).encode() if self.rank == source else b""

        told: T = json.loads(self.exchange_bytes(make, purpose)[source])
        return told

    def agree(self, flag: bool, purpose: str = "agree") -> bool:
        return all(told == b"1" for told in self.exchange_bytes(lambda: b"1" if flag else b"0", purpose))

    # ------------------------------------------------------------------------------------ tensors

    def scatter(self, parcels: Sequence[Parcel | None] | None, source: int = 0) -> Parcel:
        if self._mail is None:
            self._mail = Mail(self.rank, self.timeout_s)
        return self._mail.scatter(parcels, source) or no_parcel()

    def gather(self, tree: T) -> T:
        return self._collectives().gather(tree)

    def reduce(self, tree: T, how: Reduction) -> T:
        return self._collectives().reduce(tree, how)

    def broadcast_tensors(self, tree: T, source: int = 0) -> T:
        return self._collectives().broadcast(tree, source)

    def _collectives(self) -> Collectives:
        return Collectives(self._roll_call(), self.timeout_s)

    def _roll_call(self) -> RollCall:
        with _guard:
            if self._store not in _roll_calls:
                _roll_calls[self._store] = RollCall(self._store, self.rank, self.size)
            return _roll_calls[self._store]


def joined_group() -> int | None:
    """An identity of the process group that this process is in; None if it is in none."""
    return id(distributed_c10d._get_default_group()) if dist.is_initialized() else None


def join_ranks(
    *,
    backend: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    local_rank: int | None = None,
    local_size: int | None = None,
) -> Ranks:
    """Meet the processes that a launcher started together, as the environment tells (RANK, MASTER_ADDR ...).

    A process group that exists is used as it is.

    Args:
        backend: of torch.distributed, as "gloo" or "cpu:gloo,cuda:nccl".
        timeout_s: how long ranks wait for each other, seconds.
        local_rank: this process's number on its machine.
        local_size: how many of the processes run on this machine.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return Ranks(timeout_s=timeout_s, local_rank=local_rank, local_size=local_size)


def leave_ranks() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
