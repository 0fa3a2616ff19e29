"""One bracket of HyperBand: which of its trials wait at a rung, and which go past it; pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Bracket", "Halving"]


class Halving(NamedTuple):
    """What becomes of trials that waited at a rung: their ids, best first."""

    go_on: list[str]
    stop: list[str]


@dataclass(slots=True)
class _Member:
    number: int
    time: float = 0.0
    score: float = -math.inf


class Bracket:
    """Trials that are compared with each other, when all of them have come to the same rung.

    Args:
        size: most trials.
        first_rung: in units of time.
        max_t: the end, likewise.
        factor: how many times further each rung lies than the one before; one of so many trials gets past it.
        halvings: how many rungs there are before the end.
    """

    def __init__(self, size: int, first_rung: int, max_t: float, factor: float, halvings: int) -> None:
        self.size = size
        self.rung: float = min(first_rung, max_t)
        self.halvings = halvings
        self.added = 0
        self._survivors = 0
        self._first_rung = True
        self._max_t = max_t
        self._factor = factor
        self._members: dict[str, _Member] = {}

    @property
    def takes_more(self) -> bool:
        """Whether a new trial may join: not when it is full, nor when the others are past the first rung."""
        return self._first_rung and self.added < self.size

    def add(self, trial_id: str, number: int) -> None:
        """A new trial joins."""
        self.added += 1
        self._members[trial_id] = _Member(number)

    def __contains__(self, trial_id: object) -> bool:
        return trial_id in self._members

    def __len__(self) -> int:
        return len(self._members)

    def remove(self, trial_id: str) -> None:
        """A trial ended; nobody waits for it any more."""
        self._members.pop(trial_id, None)

    def arrive(self, trial_id: str, time: float, score: float) -> None:
        """A trial has come to the rung."""
        member = self._members[trial_id]
        member.time, member.score = time, score

    def waits(self, trial_id: str) -> bool:
        """Whether a trial is at the rung, so that it must not go on now."""
        return self.halvings > 0 and trial_id in self._members and self._members[trial_id].time >= self.rung

    def halve(self) -> Halving:
        """If all trials are at the rung, decide which of them go on to the next one.

        A trial that came further than the next rung already waits there, so there may be several halvings at
        once. None is decided on while one trial is on its way.
        """
        stopped: list[str] = []
        waited = [name for name in self._members if self.waits(name)]
        while self.halvings > 0 and self._members and all(self.waits(name) for name in self._members):
            best_first = sorted(self._members, key=lambda name: self._worth(self._members[name]))
            self._survivors = math.ceil((self.added if self._first_rung else self._survivors) / self._factor)
            for name in best_first[self._survivors :]:
                stopped.append(name)
                del self._members[name]
            self._first_rung = False
            self.halvings -= 1
            self.rung = (
                min(math.floor(self.rung * self._factor), self._max_t) if self.halvings else self._max_t
            )
        went_on = [name for name in waited if name in self._members and not self.waits(name)]
        return Halving(sorted(went_on, key=lambda name: self._worth(self._members[name])), stopped)

    @staticmethod
    def _worth(member: _Member) -> tuple[float, int]:
        return (-member.score, member.number)
