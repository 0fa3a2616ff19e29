"""The global random generators of trials that share a process: each trial has its own stream."""

from __future__ import annotations

import random
import sys
from typing import Any

__all__ = ["Generators"]


class Generators:
    """Hands the global generators of Python, NumPy and torch (on the CPU) from trial to trial.

    They are swapped when another trial gets its turn, not between: one trial after another costs next to
    nothing. A library that isn't loaded yet is left alone.
    """

    def __init__(self) -> None:
        self._whose: str | None = None
        self._kept: dict[str, tuple[Any, Any, Any]] = {}
        self._before: tuple[Any, Any, Any] | None = None

    def give_to(self, run: str, seed: int) -> None:
        """Have them be this run's: where it left them; or, the first time, as `seed` says."""
        if run == self._whose:
            return
        if self._before is None:
            self._before = _states()
        if self._whose is not None:
            self._kept[self._whose] = _states()
        self._whose = run
        if run in self._kept:
            _restore(self._kept.pop(run))
        else:
            _seed(seed)

    def forget(self, run: str) -> None:
        """This run is over."""
        self._kept.pop(run, None)
        if self._whose == run:
            self._whose = None

    def close(self) -> None:
        """Leave them as they were found."""
        if self._before is not None:
            _restore(self._before)
        self._kept.clear()
        self._whose = self._before = None


def _states() -> tuple[Any, Any, Any]:
    numpy, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    return (
        random.getstate(),
        numpy.get_state() if numpy else None,
        torch.default_generator.get_state() if torch else None,
    )


def _restore(states: tuple[Any, Any, Any]) -> None:
    python, numpy, torch = states
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy.random"].set_state(numpy)
    if torch is not None:
        sys.modules["torch"].default_generator.set_state(torch)


def _seed(seed: int) -> None:
    random.seed(seed)
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed(seed)
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(seed)
