"""The ranks of a run: how many there are, which one this is, and what they do together.

This module is the whole of what the rest of keepstep knows about other processes. A part that has to
agree with other ranks asks a `World`; with one process that is `OneRank`, whose answers are trivial, so
no caller needs to ask whether it runs alone.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

__all__ = ["OneRank", "Reduction", "World"]

T = TypeVar("T")
Reduction = Literal["sum", "mean", "none"]


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

    def __repr__(self) -> str:
        return "OneRank()"
