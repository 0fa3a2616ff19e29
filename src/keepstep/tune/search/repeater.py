"""`Repeater`: each configuration several times, to see past what chance does to training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Final, Literal

from keepstep.tune.result import look_up
from keepstep.tune.search.around import SearcherAround, check_count
from keepstep.tune.search.base import Searcher
from keepstep.tune.search.space import copied, flat

__all__ = ["TRIAL_INDEX", "Repeater"]

TRIAL_INDEX: Final = "__trial_index__"
"""In a configuration: which of the repeated trials it is, from 0; good as a seed."""


@dataclass
class _Group:
    """Trials of one configuration.

    Attributes:
        first: the id of the first, the one that the searcher knows.
        config: what it suggested.
        ended: by trial id: the last result, None if there is none; only of those that ended.
        size: how many were made.
    """

    first: str
    config: dict[str, Any]
    ended: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    size: int = 1


class Repeater(SearcherAround):
    """Tries each configuration of another searcher several times, and tells it the mean.

    `TuneConfig.num_samples` counts trials, repeated ones too: a multiple of `repeat`. A scheduler that ends
    trials early makes the mean one of unequal things.

    Args:
        searcher: the other one. It is told of one trial for each configuration, when all have ended: with the
            mean of its metrics over those that reported them, or as failed if none did.
        repeat: how many trials of each configuration.
        set_index: put which one it is into the configuration, as `TRIAL_INDEX`.

    Raises:
        UsageError: `searcher` is none, or `repeat` is no whole number of at least 1.
    """

    def __init__(self, searcher: Searcher, repeat: int = 1, set_index: bool = True) -> None:
        super().__init__(searcher)
        check_count("Repeater.repeat", repeat)
        self.repeat = repeat
        self.set_index = set_index
        self._group: _Group | None = None
        self._group_of: dict[str, _Group] = {}
        self._index_of: dict[str, int] = {}

    def describe(self) -> dict[str, Any]:
        return {"searcher": self.searcher, "repeat": self.repeat, "set_index": self.set_index}

    def set_search_properties(
        self,
        metric: str | None,
        mode: Literal["min", "max"] | None,
        config: Mapping[str, Any],
        *,
        num_samples: int = -1,
        **spec: Any,
    ) -> bool:
        """Begin anew, as the other searcher does; it is told of `num_samples` divided by `repeat`."""
        self._group, self._group_of, self._index_of = None, {}, {}
        if num_samples > 0 and num_samples % self.repeat:
            self.messages.append(
                f"num_samples={num_samples} is no multiple of Repeater's repeat={self.repeat}: the last "
                "configuration is repeated less often, and the searcher does not learn of it"
            )
        fewer = math.ceil(num_samples / self.repeat) if num_samples > 0 else num_samples
        return super().set_search_properties(metric, mode, config, num_samples=fewer, **spec)

    @property
    def total_samples(self) -> int | None:
        total = self.searcher.total_samples
        return None if total is None else total * self.repeat

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        group = self._group
        if group is None or group.size >= self.repeat:
            found = self.searcher.suggest(trial_id)
            if not isinstance(found, dict):
                return found
            group = self._group = _Group(trial_id, copied(found))
        else:
            group.size += 1
        self._group_of[trial_id] = group
        self._index_of[trial_id] = group.size - 1
        config: dict[str, Any] = copied(group.config)
        return {**config, TRIAL_INDEX: group.size - 1} if self.set_index else config

    def evaluated(self, trial_id: str) -> dict[str, Any]:
        if trial_id not in self._group_of:
            return {}
        group = self._group_of[trial_id]
        drawn = self.searcher.evaluated(group.first)
        drawn = flat(group.config) if drawn is None else drawn
        return {**drawn, TRIAL_INDEX: self._index_of[trial_id]} if self.set_index else drawn

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        group = self._group_of.get(trial_id)
        if group is None or trial_id in group.ended:
            return
        group.ended[trial_id] = None if error else result
        if len(group.ended) < self.repeat:
            return
        means = {name: _mean(group.ended.values(), name) for name in self.objectives}
        if any(mean is None for mean in means.values()):
            self.searcher.on_trial_complete(group.first, None, error=True)
        else:
            self.searcher.on_trial_complete(group.first, means)


def _mean(results: Any, name: str) -> float | None:
    found = [look_up(result, name) for result in results if result]
    numbers = [float(value) for value in found if isinstance(value, Real) and not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else None
