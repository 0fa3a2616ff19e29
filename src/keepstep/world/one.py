"""A world of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from keepstep.meetings import Alone, Meeting
from keepstep.world.nested import checked_reduction, mapped
from keepstep.world.protocol import Parcel, Reduction, no_parcel

__all__ = ["OneRank"]

T = TypeVar("T")


class OneRank:
    """A world of one process: collectives return their input."""

    kind = "NO"
    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def barrier(self, purpose: str = "wait_for_everyone", failure: BaseException | None = None) -> None:
        """Return at once."""

    def gather(self, tree: T) -> T:
        """Return `tree`."""
        return tree

    def reduce(self, tree: T, how: Reduction) -> T:
        """Return a copy of `tree`: all reductions over one rank give the values themselves."""
        checked_reduction(how)
        copy: T = mapped(tree, lambda tensor: tensor.clone(), "reduce")
        return copy

    def broadcast_tensors(self, tree: T, source: int = 0) -> T:
        """Return `tree`."""
        return tree

    def broadcast(self, value: T, source: int = 0, purpose: str = "broadcast of plain data") -> T:
        """Return `value`."""
        return value

    def agree(self, flag: bool, purpose: str = "agree") -> bool:
        """Return `flag`."""
        return flag

    def scatter(self, parcels: Sequence[Parcel | None] | None, source: int = 0) -> Parcel:
        """Return the parcel of the one rank."""
        return (parcels and parcels[0]) or no_parcel()

    def exchange(self, value: T, timeout_s: float | None = None, purpose: str = "exchange") -> list[T]:
        """Return the value of the one rank."""
        return [value]

    def exchange_bytes(self, make: Callable[[], bytes], purpose: str) -> list[bytes]:
        """Return the bytes of the one rank."""
        return [make()]

    def meeting(
        self, topic: str, timeout_s: float | None = None, *, in_turn: bool = False
    ) -> contextlib.AbstractContextManager[Meeting]:
        """A meeting of one."""
        return contextlib.nullcontext(Alone())

    def __repr__(self) -> str:
        return "OneRank()"
