"""Options that a checkpoint replaced: what the script says now, and what it said when it was saved.

A restored optimizer or scheduler has the options it was saved with, so that the run goes on as it was. Who
has changed the learning rate in the script and starts it again has to be told.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

__all__ = ["options_of", "warn_of_replaced"]

_log = logging.getLogger(__name__)
_PLAIN = (bool, int, float, str, tuple, list, type(None))
_MOVED_BY_SCHEDULERS = ("lr", "momentum", "betas")


def options_of(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> dict[str, Any]:
    """Return every option by a name that tells where it belongs."""
    options: dict[str, Any] = {}
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            moved = ("params", *(_MOVED_BY_SCHEDULERS if "initial_lr" in group else ()))
            where = f"{type(optimizer).__name__} {number}, group {index}"
            options.update(
                (f"{name} of {where}", value)
                for name, value in group.items()
                if name not in moved and isinstance(value, _PLAIN)
            )
    for number, scheduler in enumerate(schedulers):
        state = scheduler.state_dict()
        arguments = set(inspect.signature(type(scheduler)).parameters) - {"last_epoch"}
        options.update(
            (f"{name} of {type(scheduler).__name__} {number}", state[name])
            for name in sorted(arguments & set(state))
            if isinstance(state[name], _PLAIN)
        )
    return options


def warn_of_replaced(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Name the options whose values a checkpoint replaced."""
    replaced = [
        f"{name} is {after[name]!r}, not {value!r}"
        for name, value in before.items()
        if name in after and after[name] != value
    ]
    if replaced:
        _log.warning(
            "The run goes on with the options it was saved with: %s. To change one, set it after resume().",
            "; ".join(replaced),
        )
