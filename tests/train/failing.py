"""A store whose disk fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keepstep import Store


def fail_once(store: Store | None, first: Callable[[], object] = lambda: None) -> None:
    """Have the next commit call `first`, and fail; the ones after it are made."""
    assert store is not None
    saves, commit = store._saves, store._saves._committed

    def fail(*_: Any) -> None:
        saves._committed = commit  # type: ignore[method-assign]
        first()
        raise OSError(5, "the disk is on fire")

    saves._committed = fail  # type: ignore[method-assign,assignment]
