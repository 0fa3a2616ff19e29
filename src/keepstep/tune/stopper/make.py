"""What `RunConfig.stop` holds, as a stopper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keepstep.errors import UsageError
from keepstep.tune.stopper.base import CombinedStopper, NoopStopper, Stopper
from keepstep.tune.stopper.bounds import DictionaryStopper, FunctionStopper

__all__ = ["make_stopper"]


def make_stopper(stop: Any) -> Stopper:
    """What `RunConfig.stop` holds, as one stopper that has been told nothing.

    Args:
        stop: {metric: bound}, a function of (trial_id, result), a `Stopper`, a list of these, or None.

    Raises:
        UsageError: it is something else, or can't be used as that.
    """
    if stop is None:
        return NoopStopper()
    if isinstance(stop, Stopper):
        return stop.anew()
    if isinstance(stop, Mapping):
        return DictionaryStopper(stop)
    if isinstance(stop, list | tuple):
        return CombinedStopper(*map(make_stopper, stop))
    if FunctionStopper.is_valid_function(stop):
        return FunctionStopper(stop)
    if isinstance(stop, type) and issubclass(stop, Stopper):
        raise UsageError(f"stop is the class {stop.__name__}; expected an object of it: {stop.__name__}(...)")
    raise UsageError(
        f"stop is {stop!r:.200}; expected {{metric: bound}}, a function of (trial_id, result), a Stopper, "
        "or a list of these"
    )
