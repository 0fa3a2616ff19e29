"""What searchers that stand around another one have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from keepstep.errors import UsageError
from keepstep.tune.search.base import Searcher

__all__ = ["SearcherAround", "check_count"]


class SearcherAround(Searcher):
    """Base class of searchers that hand over what another one suggests.

    Args:
        searcher: the other one.

    Raises:
        UsageError: it is none.
    """

    def __init__(self, searcher: Searcher) -> None:
        if not isinstance(searcher, Searcher):
            raise UsageError(f"{type(self).__name__} takes a Searcher; it was given {searcher!r:.200}")
        super().__init__(searcher.metric, searcher.mode)
        self.searcher = searcher
        self.counts_samples = searcher.counts_samples

    def set_seed(self, seed: int) -> None:
        self.searcher.set_seed(seed)

    def set_search_properties(
        self, metric: str | None, mode: Literal["min", "max"] | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        accepted = self.searcher.set_search_properties(metric, mode, config, **spec)
        self.metric, self.mode = self.searcher.metric, self.searcher.mode
        return accepted

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.searcher.objectives


def check_count(name: str, value: object) -> None:
    """Refuse what is no whole number of at least 1.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}; expected a whole number of at least 1")
