"""How many rounds, operations, flips: counted where they happen, told once at the end of the run."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

__all__ = ["Tally", "draw_seed", "rounds", "summary"]

_PREFIX = "counted: "


class Tally(Protocol):
    """`tally(what, how_many)` adds to the figures that are told at the end."""

    def __call__(self, what: str, count: int = 1) -> None: ...


def tally_of(properties: list[tuple[str, Any]]) -> Tally:
    """A tally that keeps its figures in a test's properties, which also cross processes."""

    def add(what: str, count: int = 1) -> None:
        properties.append((_PREFIX + what, count))

    return add


def draw_seed() -> int:
    """A fresh seed, or that of an earlier run (`CRASH_SEED=123 make soak`); printed beside a failure."""
    given = os.environ.get("CRASH_SEED")
    seed = int(given) if given else random.SystemRandom().randrange(2**32)
    print(f"CRASH_SEED={seed}")
    return seed


def rounds(usual: int) -> int:
    """How many rounds to do: `usual` of them, times the number in CRASH_ROUNDS."""
    return max(1, round(usual * float(os.environ.get("CRASH_ROUNDS", "1"))))


def summary(reports: Iterable[Any]) -> list[str]:
    """One line for each thing that was counted."""
    total: Counter[str] = Counter()
    for report in reports:
        for name, count in getattr(report, "user_properties", ()):
            if name.startswith(_PREFIX) and getattr(report, "when", "") == "call":
                total[name.removeprefix(_PREFIX)] += count
    return [f"{count:>9,} {what}" for what, count in sorted(total.items())]
