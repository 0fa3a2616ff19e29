"""Which configurations are tried.

`Searcher` is what all of them are; `BasicVariantGenerator` walks through grids and draws at random,
`OptunaSearch` (in `keepstep.tune.search.optuna`) learns from results, `ConcurrencyLimiter` and `Repeater`
stand around another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from keepstep.lazy import lazy_names
from keepstep.tune.search.create import NOT_HERE, missing

if TYPE_CHECKING:
    from keepstep.tune.search.base import Searcher as Searcher
    from keepstep.tune.search.basic_variant import BasicVariantGenerator as BasicVariantGenerator
    from keepstep.tune.search.concurrency_limiter import ConcurrencyLimiter as ConcurrencyLimiter
    from keepstep.tune.search.create import create_searcher as create_searcher
    from keepstep.tune.search.repeater import Repeater as Repeater
    from keepstep.tune.search.space import grid_search as grid_search

_HOME_OF_NAME = {
    "BasicVariantGenerator": "keepstep.tune.search.basic_variant",
    "ConcurrencyLimiter": "keepstep.tune.search.concurrency_limiter",
    "Repeater": "keepstep.tune.search.repeater",
    "Searcher": "keepstep.tune.search.base",
    "create_searcher": "keepstep.tune.search.create",
    "grid_search": "keepstep.tune.search.space",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605
_find, __dir__ = lazy_names(__name__, _HOME_OF_NAME)


def __getattr__(name: str) -> Any:
    if name in NOT_HERE.values():
        raise missing(name)  # no AttributeError: `from ... import` would say less
    return _find(name)
