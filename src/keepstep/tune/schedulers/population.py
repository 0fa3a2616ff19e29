"""How the members of a population stand: who is among the best, who among the worst; pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from keepstep.tune.experiment.trial import Trial

__all__ = ["Member", "Quantiles", "quantiles"]


@dataclass(eq=False, slots=True)
class Member:
    """How a trial stands.

    Attributes:
        trial: which.
        score: when it was last compared; None: it never was.
        time: how far it had come then.
        iteration: its `training_iteration` then.
        perturbed_at: when it last got its turn to change.
        arrived: whether it waits for all others, where all change at once.
        asked: whether it was given one more result's time, so that a checkpoint gets ready.
    """

    trial: Trial
    score: float | None = None
    time: float = 0.0
    iteration: int = 0
    perturbed_at: float = 0.0
    arrived: bool = False
    asked: bool = False

    @property
    def fresh(self) -> bool:
        """Whether there is a checkpoint of what it was compared with."""
        newest = self.trial.resume_from
        return newest is not None and newest.iteration >= self.iteration


@dataclass(frozen=True)
class Quantiles:
    """The worst and the best of a population, each worst first."""

    lower: Sequence[Member]
    upper: Sequence[Member]


def quantiles(members: Sequence[Member], fraction: float) -> Quantiles:
    """The worst and the best of those that were compared.

    Args:
        members: the population.
        fraction: how many of them are the worst, and how many the best; rounded up, at most half.
    """
    compared = sorted(
        (member for member in members if member.score is not None), key=lambda member: member.trial.number
    )
    compared.sort(key=lambda member: -math.inf if member.score is None else member.score)
    count = min(math.ceil(len(compared) * fraction), len(compared) // 2)
    best = compared[len(compared) - count :]
    return Quantiles(compared[:count], [member for member in best if member.score != -math.inf])
