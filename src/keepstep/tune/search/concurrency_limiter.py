"""`ConcurrencyLimiter`: a searcher that is told of few trials at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from keepstep.tune.search.around import SearcherAround, check_count
from keepstep.tune.search.base import Searcher

__all__ = ["ConcurrencyLimiter"]


class ConcurrencyLimiter(SearcherAround):
    """Asks another searcher for no more configurations while too many of its trials run.

    Searchers that learn from results suggest better ones if they wait for them.

    Args:
        searcher: the other one.
        max_concurrent: most of its trials that have not ended.
        batch: tell it of results only when all of its trials have ended, and ask for new ones only then or
            while there is room; False: of each as it ends.

    Raises:
        UsageError: `searcher` is none, or `max_concurrent` is no whole number of at least 1.
    """

    def __init__(self, searcher: Searcher, max_concurrent: int, batch: bool = False) -> None:
        super().__init__(searcher)
        check_count("ConcurrencyLimiter.max_concurrent", max_concurrent)
        self.max_concurrent = max_concurrent
        self.batch = batch
        self._live: dict[str, tuple[dict[str, Any] | None, bool] | None] = {}

    def describe(self) -> dict[str, Any]:
        return {"searcher": self.searcher, "max_concurrent": self.max_concurrent, "batch": self.batch}

    def set_search_properties(
        self, metric: str | None, mode: Literal["min", "max"] | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        self._live = {}
        return super().set_search_properties(metric, mode, config, **spec)

    @property
    def total_samples(self) -> int | None:
        return self.searcher.total_samples

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if len(self._live) >= self.max_concurrent:
            return None
        found = self.searcher.suggest(trial_id)
        if isinstance(found, dict):
            self._live[trial_id] = None
        return found

    def evaluated(self, trial_id: str) -> dict[str, Any] | None:
        return self.searcher.evaluated(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self.searcher.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if trial_id not in self._live:
            return
        self._live[trial_id] = (result, error)
        ended = {name: outcome for name, outcome in self._live.items() if outcome is not None}
        if self.batch and len(ended) < len(self._live):
            return
        for name, (last, failed) in ended.items():
            self.searcher.on_trial_complete(name, last, failed)
            del self._live[name]
