"""What a save costs the training loop, and how far apart saves have to be for it. Without a clock of its own.

A save costs what `checkpoint()` takes, what steps wait until the state is copied, and what the steps that run
while it is being written are slower than others. The first two are measured; the third is the number of such
steps times the difference of two medians, so that an evaluation between two steps, or one slow batch, counts
for nothing. Over saves the newer ones weigh more.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from keepstep.train.settings.config import CheckpointPolicy

__all__ = ["Cost", "CostMeter", "Spacing", "space", "young_interval_s"]

_STEPS_REMEMBERED = 33
_STEPS_OF_A_BASELINE = 3
_SAVES_REMEMBERED = 8
_WEIGHT_OF_THE_ONE_BEFORE = 0.7


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one save costs the training loop, in seconds.

    Attributes:
        blocked_s: in `checkpoint()` itself.
        waited_s: at optimizer steps, until the state was copied.
        slowed_s: in steps that ran while it was being written, compared with others.
        is_bound: there were no other steps yet: `slowed_s` is all the time of these steps, and too much.
    """

    blocked_s: float = 0.0
    waited_s: float = 0.0
    slowed_s: float = 0.0
    is_bound: bool = False

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.blocked_s + self.waited_s + self.slowed_s


@dataclass(slots=True)
class _Save:
    """One save: its own costs, and the steps that ran while it was being written."""

    blocked_s: float
    waited_s: float = 0.0
    steps: int = 0
    usual_s: float = 0.0


class CostMeter:
    """Learns what saves cost. Told of each step and each save; remembers a few dozen numbers."""

    def __init__(self) -> None:
        self._free: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._loaded: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._saves: deque[_Save] = deque(maxlen=_SAVES_REMEMBERED)
        self._open = False

    @property
    def step_s(self) -> float | None:
        """A step's usual time while nothing is being written; None until a few were seen."""
        return median(self._free) if len(self._free) >= _STEPS_OF_A_BASELINE else None

    def step(self, duration_s: float, *, waited_s: float = 0.0, busy: bool) -> None:
        """Note an optimizer step.

        Args:
            duration_s: from the end of one call of `checkpoint()` to the beginning of the next.
            waited_s: how much of it was spent waiting until the state was copied.
            busy: a save was being written when it began.
        """
        if not busy or not self._saves:
            self._open = False
            self._free.append(duration_s - waited_s)
            return
        save = self._saves[-1]
        self._loaded.append(duration_s - waited_s)
        save.waited_s += waited_s
        save.steps += 1
        save.usual_s = median(self._loaded)

    def save(self, blocked_s: float) -> None:
        """Note that a save has begun, and how long the call took that began it."""
        self._saves.append(_Save(blocked_s))
        self._loaded.clear()
        self._open = True

    def cost(self) -> Cost | None:
        """What a save costs, as far as can be told; None before the first."""
        if not self._saves:
            return None
        usual_s = self.step_s
        saves = list(self._saves)
        if self._open and len(saves) > 1:
            del saves[-1]  # its bill is not complete yet
        weights = [_WEIGHT_OF_THE_ONE_BEFORE**age for age in reversed(range(len(saves)))]
        slowed = [save.steps * max(0.0, save.usual_s - (usual_s or 0.0)) for save in saves]
        return Cost(
            blocked_s=_mean([save.blocked_s for save in saves], weights),
            waited_s=_mean([save.waited_s for save in saves], weights),
            slowed_s=_mean(slowed, weights),
            is_bound=usual_s is None,
        )


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spacing:
    """How far apart saves are to be, and why.

    Attributes:
        rule: the fields of the policy that say so.
        cost: of one save; None before the first.
        least_s: time that has to pass from the end of one call that saves to the next, in seconds.
        wanted_s: time after which a save is due; None if only steps count.
        interval_s: what comes of it, in seconds; None while it is not known how long a step takes.
        interval_steps: about as many steps; None while it is not known.
    """

    rule: str
    cost: Cost | None
    least_s: float
    wanted_s: float | None
    interval_s: float | None
    interval_steps: int | None

    def to_json(self) -> dict[str, Any]:
        """For the manifest: plain values, times rounded to microseconds."""
        known = None
        if self.cost is not None:
            known = {name: round(value, 6) for name, value in asdict(self.cost).items() if name != "is_bound"}
            known["slowed_s"] = None if self.cost.is_bound else known["slowed_s"]
        return {
            "rule": self.rule,
            "cost": known,
            "interval_s": None if self.interval_s is None else round(self.interval_s, 6),
            "interval_steps": self.interval_steps,
        }

    def differs_from(self, other: Spacing | None, share: float = 0.25) -> bool:
        """Whether a person would want to hear of it: an interval that is much longer or shorter."""
        if other is None or other.interval_s is None or self.interval_s is None:
            return other is None or other.interval_s is not self.interval_s
        return abs(self.interval_s - other.interval_s) > share * max(self.interval_s, other.interval_s)

    def __str__(self) -> str:
        if self.cost is None or self.interval_s is None:
            return f"{self.rule}: what a save costs is not known yet"
        steps = "" if self.interval_steps is None else f", about {self.interval_steps:,} steps"
        cost, most = self.cost, "at most " if self.cost.is_bound else ""
        return (
            f"{self.rule}: one save every {self.interval_s:.3g} s{steps}; a save costs {most}"
            f"{cost.total_s:.3g} s ({cost.blocked_s:.3g} s blocked, {cost.waited_s:.3g} s waited for the "
            f"copy, {cost.slowed_s:.3g} s in slower steps)"
        )


def young_interval_s(cost_s: float, mean_time_between_failures_s: float) -> float:
    """The interval that loses least time to saves and failures together.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM
    17(9), 1974: the square root of twice the cost of a save times the mean time between failures. It holds
    while a save costs much less than the time between failures.

    Args:
        cost_s: of one save, in seconds.
        mean_time_between_failures_s: of the whole run (of all machines together), in seconds.
    """
    return math.sqrt(2.0 * cost_s * mean_time_between_failures_s)


def space(policy: CheckpointPolicy, cost: Cost | None, step_s: float | None) -> Spacing:
    """Decide how far apart saves are to be.

    Args:
        policy: what the user wants.
        cost: of a save; None before the first, which is then due at once where cost decides.
        step_s: a step's usual time, in seconds.
    """
    fields = ("every_n_steps", "every_s", "mean_time_between_failures_s", "max_overhead")
    given = [(name, getattr(policy, name)) for name in fields if getattr(policy, name) is not None]
    least_s, wanted_s = 0.0, policy.every_s
    spent = Cost() if cost is None else cost
    if policy.max_overhead is not None:
        least_s = spent.total_s / policy.max_overhead - spent.blocked_s
    if policy.mean_time_between_failures_s is not None:
        wanted_s = young_interval_s(spent.total_s, policy.mean_time_between_failures_s)
    elif wanted_s is None and policy.every_n_steps is None:
        wanted_s = 0.0
    times = [wanted_s] if wanted_s is not None else []
    if policy.every_n_steps is not None and step_s:
        times.append(policy.every_n_steps * step_s)
    interval_s = max(least_s, min(times)) if times and (cost is not None or policy.every_s) else None
    steps = interval_s / step_s if step_s and interval_s is not None else None
    if steps is None and policy.every_s is None and policy.max_overhead is None:
        steps = policy.every_n_steps  # known without a clock
    return Spacing(
        rule=", ".join(f"{name}={value:g}" for name, value in given),
        cost=cost,
        least_s=least_s,
        wanted_s=wanted_s,
        interval_s=interval_s,
        interval_steps=None if steps is None else max(1, round(steps)),
    )
