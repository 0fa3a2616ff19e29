"""The ranks of a run: how many there are, which one this is, and what they do together.

This module is the whole of what the rest of keepstep knows about other processes. A part that has to
agree with other ranks asks a `World`; with one process that is `OneRank`, whose answers are trivial, so
no caller needs to ask whether it runs alone.

Tensors go over process groups (gloo, NCCL). Everything else, and with it all of checkpointing, goes over
the key-value store that ranks found each other with, see `keepstep.meetings`: it lives on the CPU, a wait
in it can end, and a rank that failed can say so.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from keepstep.errors import RankMissingError, UsageError
from keepstep.meetings import Alone, Meeting, Topic

__all__ = ["DEFAULT_TIMEOUT_S", "OneRank", "Ranks", "Reduction", "World", "join_ranks", "joined_group"]

T = TypeVar("T")
Reduction = Literal["sum", "mean", "none"]

DEFAULT_TIMEOUT_S = 600.0

_MOST_TIMEOUT_S = 1e8
_MOST_MAIL_S = 1e6

_topics: weakref.WeakKeyDictionary[Any, dict[str, Topic]] = weakref.WeakKeyDictionary()
"""By the store that ranks meet in: meetings are numbered, so all worlds over one store count together."""
_guard = threading.Lock()


class World(Protocol):
    """What a run's ranks can do together. Every collective is called by all ranks in the same order."""

    @property
    def kind(self) -> str:
        """Accelerate's name for this kind of world: "NO" for one process."""
        ...

    @property
    def rank(self) -> int:
        """This process's number, 0 to size - 1."""
        ...

    @property
    def size(self) -> int:
        """How many processes train together."""
        ...

    @property
    def local_rank(self) -> int:
        """This process's number among those on the same machine."""
        ...

    @property
    def local_size(self) -> int:
        """How many of the processes run on this machine."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called this."""
        ...

    def gather(self, tree: T) -> T:
        """Concatenate each tensor of `tree` over the ranks, along dimension 0, on every rank."""
        ...

    def reduce(self, tree: T, how: Reduction) -> T:
        """Combine each tensor of `tree` elementwise over the ranks, on every rank."""
        ...

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return rank `source`'s value on every rank; the value is plain data."""
        ...

    def agree(self, flag: bool) -> bool:
        """Return True on every rank if all of them passed True."""
        ...

    def scatter(
        self, parcels: Sequence[tuple[bytes, torch.Tensor] | None] | None, source: int = 0
    ) -> tuple[bytes, torch.Tensor]:
        """Hand each rank a parcel of its own: some words, and data that is a uint8 tensor on the CPU.

        Args:
            parcels: on rank `source` one for each rank, by rank; None for a rank that doesn't call this. On
                other ranks None.
            source: who hands out.

        Returns:
            The parcel for this rank; an empty one if `source` had none for itself.
        """
        ...

    def exchange(self, value: T, timeout_s: float | None = None) -> list[T]:
        """Every rank's value, by rank, on every rank; values are plain data."""
        ...

    def meeting(
        self, topic: str, timeout_s: float | None = None
    ) -> contextlib.AbstractContextManager[Meeting]:
        """Meet with all ranks over a piece of work.

        Meetings of one topic follow each other; those of different topics don't mix, so that a thread
        may hold one while another thread holds another.

        Args:
            topic: the same on every rank.
            timeout_s: how long a step waits for the other ranks, seconds; None for the world's default.
        """
        ...


class OneRank:
    """A world of one process: collectives return their input."""

    kind = "NO"
    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def barrier(self) -> None:
        """Return at once."""

    def gather(self, tree: T) -> T:
        """Return `tree`."""
        return tree

    def reduce(self, tree: T, how: Reduction) -> T:
        """Return `tree`, as sum and mean over one rank are the values themselves."""
        return tree

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return `value`."""
        return value

    def agree(self, flag: bool) -> bool:
        """Return `flag`."""
        return flag

    def scatter(
        self, parcels: Sequence[tuple[bytes, torch.Tensor] | None] | None, source: int = 0
    ) -> tuple[bytes, torch.Tensor]:
        """Return the parcel of the one rank."""
        return (parcels and parcels[0]) or _no_parcel()

    def exchange(self, value: T, timeout_s: float | None = None) -> list[T]:
        """Return the value of the one rank."""
        return [value]

    def meeting(
        self, topic: str, timeout_s: float | None = None
    ) -> contextlib.AbstractContextManager[Meeting]:
        """A meeting of one."""
        return contextlib.nullcontext(Alone())

    def __repr__(self) -> str:
        return "OneRank()"


def _no_parcel() -> tuple[bytes, torch.Tensor]:
    return b"", torch.empty(0, dtype=torch.uint8)


# ------------------------------------------------------------------------------------- many ranks


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
        self._mail: Any = None
        self._store: Any = distributed_c10d._get_default_store() if store is None else store

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    # --------------------------------------------------------------------------------- plain data

    @contextlib.contextmanager
    def meeting(self, topic: str, timeout_s: float | None = None) -> Iterator[Meeting]:
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
        with place.meeting(self.timeout_s if timeout_s is None else timeout_s) as meeting:
            yield meeting

    def exchange(self, value: T, timeout_s: float | None = None) -> list[T]:
        """Every rank's value; anything that JSON can hold (tuples arrive as lists)."""
        with self.meeting("exchange", timeout_s) as meeting:
            return [json.loads(data) for data in meeting.exchange(json.dumps(value).encode())]

    def barrier(self) -> None:
        self.exchange(None)

    def broadcast(self, value: T, source: int = 0) -> T:
        return self.exchange(value if self.rank == source else None)[source]  # type: ignore[return-value]

    def agree(self, flag: bool) -> bool:
        return all(self.exchange(bool(flag)))

    # ------------------------------------------------------------------------------------ tensors

    def scatter(
        self, parcels: Sequence[tuple[bytes, torch.Tensor] | None] | None, source: int = 0
    ) -> tuple[bytes, torch.Tensor]:
        """See `World.scatter`. Goes over a gloo group of its own, which the first call makes, on all ranks.

        Raises:
            RankMissingError: `source`, or a rank it had a parcel for, was gone or did not come.
        """
        if self._mail is None:
            self._mail = dist.new_group(
                backend="gloo", timeout=dt.timedelta(seconds=min(self.timeout_s, _MOST_MAIL_S))
            )
        try:
            return self._received(source) if parcels is None else self._sent(parcels)
        except RuntimeError as error:
            others = [source] if parcels is None else [r for r in range(self.size) if r != self.rank]
            raise RankMissingError(
                f"handing out data from rank {source} broke off on rank {self.rank}; a process has ended, or "
                f"did not come within {self.timeout_s:g} s: {error}",
                ranks=others,
                waited_s=self.timeout_s,
            ) from error

    def _sent(self, parcels: Sequence[tuple[bytes, torch.Tensor] | None]) -> tuple[bytes, torch.Tensor]:
        under_way: list[Any] = []
        for rank, parcel in enumerate(parcels):
            if parcel is None or rank == self.rank:
                continue
            words, data = parcel
            body = torch.cat([data, torch.frombuffer(bytearray(words), dtype=torch.uint8)])
            head = torch.tensor([len(words), data.numel()])
            # What is sent has to stay alive until it was received.
            under_way += [(dist.isend(part, rank, group=self._mail), part) for part in (head, body)]
        for work, _ in under_way:
            work.wait()
        return parcels[self.rank] or _no_parcel()

    def _received(self, source: int) -> tuple[bytes, torch.Tensor]:
        head = torch.empty(2, dtype=torch.int64)
        dist.recv(head, source, group=self._mail)
        words, size = head.tolist()
        body = torch.empty(words + size, dtype=torch.uint8)
        dist.recv(body, source, group=self._mail)
        # The data comes first: tensors are views of it, so it has to begin at an aligned address.
        return body[size:].numpy().tobytes(), body[:size]

    def gather(self, tree: T) -> T:
        gathered: T = _mapped(tree, self._gathered)
        return gathered

    def reduce(self, tree: T, how: Reduction) -> T:
        if how not in {"sum", "mean", "none"}:
            raise UsageError(f'reduction is {how!r}; allowed: "sum", "mean", "none"')
        reduced: T = tree if how == "none" else _mapped(tree, lambda tensor: self._reduced(tensor, how))
        return reduced

    def _gathered(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows may differ in number between ranks; they travel as bytes, which every backend takes."""
        rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach().contiguous()
        lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(rows)], dtype=torch.int64, device=rows.device))
        counts = [int(length) for length in lengths]
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        if not padded.numel():
            return padded.new_empty((sum(counts), *rows.shape[1:]))
        data = padded.reshape(-1).view(torch.uint8)
        received = [torch.empty_like(data) for _ in range(self.size)]
        dist.all_gather(received, data)
        parts = [
            part.view(rows.dtype).reshape(padded.shape)[:count]
            for part, count in zip(received, counts, strict=True)
        ]
        return torch.cat(parts)

    def _reduced(self, tensor: torch.Tensor, how: Reduction) -> torch.Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.size if how == "mean" else total


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
        dist.init_process_group(backend, timeout=dt.timedelta(seconds=timeout_s))
    return Ranks(timeout_s=timeout_s, local_rank=local_rank, local_size=local_size)


def _mapped(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`tree` with each tensor changed; other leaves stay."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(item, change) for item in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(item, change) for item in tree)
    if isinstance(tree, Mapping):
        return type(tree)({key: _mapped(item, change) for key, item in tree.items()})  # type: ignore[call-arg]
    return tree
