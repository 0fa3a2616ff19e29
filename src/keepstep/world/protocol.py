"""What a run's ranks can do together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar

import torch

from keepstep.meetings import Meeting

__all__ = ["Parcel", "Reduction", "World", "no_parcel"]

T = TypeVar("T")
Reduction = Literal["sum", "mean", "max", "none"]
Parcel = tuple[bytes, torch.Tensor]
"""Some words, and data that is a uint8 tensor on the CPU."""


class World(Protocol):
    """What a run's ranks can do together. Every collective is called by all ranks in the same order.

    If ranks call different ones, or with trees of tensors that don't match, all of them raise
    CollectiveMismatchError, which tells who called what and where. If one does not come within the
    time-out, or its process ends, the others raise RankMissingError; if it fails on the way, RankFailedError.

    Trees of tensors are tensors in any nesting of lists, tuples, named tuples and mappings.
    """

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

    def barrier(self, purpose: str = "wait_for_everyone", failure: BaseException | None = None) -> None:
        """Return once every rank has called this.

        Args:
            purpose: the call's name in messages; the same on every rank.
            failure: what kept this rank from doing its part: the other ranks raise RankFailedError.
        """
        ...

    def gather(self, tree: T) -> T:
        """Concatenate each tensor of `tree` over the ranks, along dimension 0, on every rank.

        Tensors have the same shape on every rank; those without dimensions become one row each.
        """
        ...

    def reduce(self, tree: T, how: Reduction) -> T:
        """Combine each tensor of `tree` elementwise over the ranks, into new tensors on every rank."""
        ...

    def broadcast_tensors(self, tree: T, source: int = 0) -> T:
        """Write rank `source`'s values into the tensors of `tree` on every rank; returns `tree`."""
        ...

    def broadcast(self, value: T, source: int = 0, purpose: str = "broadcast of plain data") -> T:
        """Return rank `source`'s value on every rank; the value is plain data."""
        ...

    def agree(self, flag: bool, purpose: str = "agree") -> bool:
        """Return True on every rank if all of them passed True."""
        ...

    def scatter(self, parcels: Sequence[Parcel | None] | None, source: int = 0) -> Parcel:
        """Hand each rank a parcel of its own: some words, and data that is a uint8 tensor on the CPU.

        Args:
            parcels: on rank `source` one for each rank, by rank; None for a rank that doesn't call this. On
                other ranks None.
            source: who hands out.

        Returns:
            The parcel for this rank; an empty one if `source` had none for itself.

        Raises:
            RankMissingError: `source`, or a rank it had a parcel for, was gone or did not come.
        """
        ...

    def exchange(self, value: T, timeout_s: float | None = None, purpose: str = "exchange") -> list[T]:
        """Every rank's value, by rank, on every rank; values are plain data.

        Args:
            value: anything that JSON can hold (tuples arrive as lists).
            timeout_s: how long to wait for the other ranks, seconds; None for the world's default.
            purpose: the call's name in messages; the same on every rank.
        """
        ...

    def exchange_bytes(self, make: Callable[[], bytes], purpose: str) -> list[bytes]:
        """Every rank's bytes, by rank, on every rank; they may differ in length.

        Args:
            make: gives this rank's; if it raises, the other ranks raise RankFailedError.
            purpose: the call's name in messages; the same on every rank.
        """
        ...

    def meeting(
        self, topic: str, timeout_s: float | None = None, *, in_turn: bool = False
    ) -> contextlib.AbstractContextManager[Meeting]:
        """Meet with all ranks over a piece of work.

        Meetings of one topic follow each other; those of different topics don't mix, so that a thread
        may hold one while another thread holds another.

        Args:
            topic: the same on every rank.
            timeout_s: how long a step waits for the other ranks, seconds; None for the world's default.
            in_turn: main threads come to it, in turn with what else they do with the others: one that waits
                here looks whether the others wait for it elsewhere.
        """
        ...


def no_parcel() -> Parcel:
    """An empty one."""
    return b"", torch.empty(0, dtype=torch.uint8)
