"""Which rank this process is, for what has to know it without being handed a world: loggers and trackers.

An `Accelerator` settles it. Before that the launcher's environment says it: a message that is meant for the
main process alone is not printed by all of them just because it comes early.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

from keepstep.errors import UsageError

__all__ = ["Place", "current", "level_from_environment", "settle"]


class Place(Protocol):
    """What a `keepstep.world.World` says of one rank."""

    @property
    def rank(self) -> int:
        """This process's number."""
        ...

    @property
    def size(self) -> int:
        """How many processes train together."""
        ...

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        ...

    def barrier(self) -> None:
        """Return once every rank has called this."""
        ...


class _Unsettled:
    """What a launcher's environment says, before ranks have met."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.rank = _number(environment, "RANK", 0)
        self.size = _number(environment, "WORLD_SIZE", 1)
        self.local_rank = _number(environment, "LOCAL_RANK", self.rank)

    def barrier(self) -> None:
        if self.size > 1:
            raise UsageError(
                f"in_order=True makes all {self.size} ranks wait for each other, but they have not met yet. "
                "Make the Accelerator (or PartialState) first"
            )


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else otherwise


_settled: list[Place] = []


def settle(place: Place) -> None:
    """Say which rank this process is, from now on."""
    _settled[:] = [place]


def current() -> Place:
    """This process's rank, as far as it is known."""
    return _settled[0] if _settled else _Unsettled(os.environ)


def level_from_environment() -> str | None:
    """The level that KEEPSTEP_LOG_LEVEL, or else ACCELERATE_LOG_LEVEL, asks for."""
    return os.environ.get("KEEPSTEP_LOG_LEVEL") or os.environ.get("ACCELERATE_LOG_LEVEL") or None
