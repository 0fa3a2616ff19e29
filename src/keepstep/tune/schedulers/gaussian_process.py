"""A small Gaussian process whose function changes with time, and where to look next by it.

Source: I. Bogunovic, J. Scarlett, V. Cevher: Time-Varying Gaussian Process Bandit Optimization, AISTATS 2016;
T. Desautels, A. Krause, J. Burdick: Parallelizing Exploration-Exploitation Tradeoffs in Gaussian Process
Bandit Optimization, JMLR 15 (2014).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Observations", "next_point"]

Array = NDArray[np.float64]

_LENGTHS: Final = (0.1, 0.2, 0.4, 0.8, 1.6)
_FORGETTING: Final = (0.01, 0.05, 0.2)
_NOISES: Final = (1e-3, 1e-2, 1e-1)
_MOST: Final = 300
"""Observations that count: the newest. A fit takes the third power of their number."""
_CANDIDATES: Final = 512
_ROUNDS: Final = 3


@dataclass(frozen=True)
class Observations:
    """What was seen.

    Attributes:
        times: when, in rounds; shape [n].
        points: where; shape [n, d], each column within about 0 and 1.
        values: what came of it; shape [n].
    """

    times: Array
    points: Array
    values: Array


@dataclass(frozen=True)
class _Kernel:
    """How alike the function is at two points and times: it forgets a share `forgetting` of it a round."""

    length: float
    forgetting: float
    noise: float

    def __call__(self, times: Array, points: Array, other_times: Array, other_points: Array) -> Array:
        distance = ((points[:, None, :] - other_points[None, :, :]) ** 2).sum(axis=2)
        rounds = np.abs(times[:, None] - other_times[None, :])
        alike: Array = np.exp(-distance / (2 * self.length**2)) * (1 - self.forgetting) ** (rounds / 2)
        return alike


class _Process:
    """A Gaussian process of observations whose values have mean 0 and variance 1."""

    def __init__(self, kernel: _Kernel, seen: Observations) -> None:
        self.kernel = kernel
        self.seen = seen
        count = len(seen.values)
        covariance = kernel(seen.times, seen.points, seen.times, seen.points)
        self._lower = np.linalg.cholesky(covariance + (kernel.noise + 1e-8) * np.eye(count))
        self._weighted = np.linalg.solve(self._lower, seen.values)

    @property
    def likelihood(self) -> float:
        """Logarithm of it, but for a constant."""
        return float(-0.5 * self._weighted @ self._weighted - np.log(np.diag(self._lower)).sum())

    def at(self, times: Array, points: Array) -> tuple[Array, Array]:
        """Mean and standard deviation there."""
        between = self.kernel(self.seen.times, self.seen.points, times, points)
        solved = np.linalg.solve(self._lower, between)
        return solved.T @ self._weighted, np.sqrt(np.maximum(1 - (solved**2).sum(axis=0), 1e-12))


def next_point(
    seen: Observations, running: Observations, time: float, context: Array, size: int, generator: Any
) -> Array:
    """Where to look next, by the upper confidence bound.

    Args:
        seen: what is known.
        running: what is being tried; its values don't count. Where somebody looks, less is to be learnt.
        time: now, in rounds.
        context: what of a point is given; shape [c].
        size: how many numbers of it are to be chosen; c + size is the width of the points.
        generator: a `numpy.random.Generator`.

    Returns:
        What to choose, within 0 and 1; shape [size].
    """
    candidates: Array = generator.random((_CANDIDATES, size))
    if len(seen.values) < 2:
        first: Array = candidates[0]
        return first
    known = _standardized(seen)
    fits = (_Process(_Kernel(*chosen), known) for chosen in itertools.product(_LENGTHS, _FORGETTING, _NOISES))
    best = max(fits, key=lambda process: process.likelihood)
    both = Observations(
        np.concatenate([known.times, running.times]),
        np.concatenate([known.points, running.points]),
        np.concatenate([known.values, np.zeros(len(running.values))]),
    )
    unsure = _Process(best.kernel, both)
    width = math.sqrt(0.2 + max(0.0, math.log(0.4 * len(known.values))))
    scale = 0.1
    top = candidates[0]
    for _ in range(_ROUNDS):
        points = np.concatenate([np.tile(context, (len(candidates), 1)), candidates], axis=1)
        times = np.full(len(candidates), time)
        bound = best.at(times, points)[0] + width * unsure.at(times, points)[1]
        top = candidates[int(np.argmax(bound))]
        near = np.clip(top + scale * generator.standard_normal((_CANDIDATES // 4, size)), 0, 1)
        candidates = np.concatenate([top[None, :], near])
        scale /= 3
    chosen: Array = top
    return chosen


def _standardized(seen: Observations) -> Observations:
    values = seen.values[-_MOST:]
    spread = values.std()
    centred = (values - values.mean()) / (spread if spread > 0 else 1.0)
    return Observations(seen.times[-_MOST:], seen.points[-_MOST:], np.clip(centred, -3, 3))
