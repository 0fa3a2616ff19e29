"""Timing side by side: every round runs every contender once, so that noise hits all of them."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.report import status

__all__ = ["Clock", "Contender", "Rounds", "interleaved", "median_us_per_call"]


class Clock:
    """Seconds since a contender started; it may mark moments on its way."""

    def __init__(self) -> None:
        self.marks: dict[str, float] = {}
        self._began = time.perf_counter()

    def mark(self, moment: str) -> None:
        self.marks[moment] = time.perf_counter() - self._began


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is timed. `before` and `after` run off the clock.

    Attributes:
        name: in the tables.
        run: on the clock; the moment of its return is marked as "done".
        before: makes room.
        after: removes what was written.
    """

    name: str
    run: Callable[[Clock], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(kw_only=True)
class Rounds:
    """Times of all contenders, in seconds: (name, moment) -> one a round."""

    times: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))

    def median_s(self, name: str, moment: str = "done") -> float:
        return statistics.median(self.times[name, moment])

    def ratio(self, name: str, to: str, moment: str = "done", to_moment: str = "done") -> float:
        """Median over the rounds of the ratio within a round."""
        pairs = zip(self.times[name, moment], self.times[to, to_moment], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def spread(self, name: str, moment: str = "done") -> str:
        times = self.times[name, moment]
        return f"{min(times):.2f} to {max(times):.2f}"


def interleaved(
    contenders: Sequence[Contender], rounds: int, *, what: str, settle: Callable[[], object] = os.sync
) -> Rounds:
    """Time A B C, C B A, A B C ...: neighbours stay neighbours, and nobody always goes first.

    Args:
        contenders: what is timed.
        rounds: how often.
        what: for the moving line on a terminal.
        settle: brings disk and memory into the same condition before each run; off the clock.
    """
    result = Rounds()
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else list(reversed(contenders)):
            with status(f"{what}: round {number + 1} of {rounds}, {contender.name}"):
                contender.before()
                gc.collect()
                settle()
                try:
                    clock = Clock()
                    contender.run(clock)
                    clock.mark("done")
                finally:
                    contender.after()
            for moment, seconds in clock.marks.items():
                result.times[contender.name, moment].append(seconds)
    return result


def median_us_per_call(call: Callable[[], object], calls: int, *, batches: int = 5) -> float:
    """Microseconds a call takes, the median of several batches."""
    per_batch = max(1, calls // batches)
    times = []
    for _ in range(batches):
        began = time.perf_counter()
        for _ in range(per_batch):
            call()
        times.append((time.perf_counter() - began) / per_batch)
    return statistics.median(times) * 1e6
