"""Executors by name; the module of one is loaded when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

from keepstep.errors import MissingPackageError, UsageError
from keepstep.tune.executors.protocol import Executor

__all__ = ["EXECUTORS", "make_executor"]

EXECUTORS: Final = {
    "local": ("keepstep.tune.executors.local", "LocalExecutor"),
    "inline": ("keepstep.tune.executors.inline", "InlineExecutor"),
    "ray": ("keepstep.tune.executors.ray", "RayExecutor"),
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
    module, name = EXECUTORS[asked]
    try:
        made: Executor = getattr(import_module(module), name)(trainable)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "keepstep":
            raise
        raise MissingPackageError(
            f"RunConfig(executor={asked!r}) needs {error.name}, which is not installed: "
            f"pip install 'keepstep[{asked}]'"
        ) from None
    return made
