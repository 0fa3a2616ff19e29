"""Executors by name; the module of one is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.lazy import imported
from keepstep.tune.executors.protocol import Executor

__all__ = ["EXECUTORS", "make_executor"]

EXECUTORS: Final = {
    "local": ("LocalExecutor", "keepstep.tune.executors.local"),
    "inline": ("InlineExecutor", "keepstep.tune.executors.inline"),
    "ray": ("RayExecutor", "keepstep.tune.executors.ray"),
}


def make_executor(asked: str | Callable[[Any], Executor], trainable: Any) -> Executor:
    """What runs trials.

    Args:
        asked: a name, or what makes one of the trainable.
        trainable: the function or class that trials run.

    Raises:
        UsageError: there is none of that name, or the trainable can't be shipped.
        MissingPackageError: it needs a package that is not installed.
    """
    if not isinstance(asked, str):
        return asked(trainable)
    if asked not in EXECUTORS:
        raise UsageError(
            f"RunConfig.executor is {asked!r}; expected one of {', '.join(map(repr, EXECUTORS))}"
        )
    made: Executor = imported(*EXECUTORS[asked], {"ray": "pip install 'keepstep[ray]'"})(trainable)
    return made
