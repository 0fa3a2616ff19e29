"""What every stopper is, and what stands around others."""

from __future__ import annotations

from functools import cached_property
from inspect import signature
from typing import Any

from keepstep.errors import UsageError

__all__ = ["CombinedStopper", "Described", "NoopStopper", "Stopper"]


class Stopper:
    """Base class. It must be a function of what it is told: after a restart it is told everything again."""

    @cached_property
    def messages(self) -> list[str]:
        """What people should be told; the driver takes it out after each call."""
        return []

    def describe(self) -> dict[str, Any] | None:
        """The arguments that make it anew, by name; None: it has to be handed over again."""
        return None

    def anew(self) -> Stopper:
        """One of the same arguments that has been told nothing; of a class of your own: this one."""
        return self

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this result ends its trial."""
        raise NotImplementedError

    def stop_all(self) -> bool:
        """Whether the experiment ends."""
        return False


class Described(Stopper):
    """One that its arguments make anew, and that has seen nothing then.

    Every argument of a subclass is kept as an attribute of that name.
    """

    def describe(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in signature(type(self)).parameters}

    def anew(self) -> Stopper:
        return type(self)(**self.describe()) if type(self).__module__.startswith("keepstep.tune.") else self


class NoopStopper(Described):
    """Stops nothing."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False


class CombinedStopper(Stopper):
    """Stops what one of several stops; all of them are told of everything.

    Args:
        stoppers: they.

    Raises:
        UsageError: something among them is none.
    """

    def __init__(self, *stoppers: Stopper) -> None:
        for stopper in stoppers:
            if not isinstance(stopper, Stopper):
                raise UsageError(f"CombinedStopper takes stoppers; it was given {stopper!r:.200}")
        self.stoppers = stoppers

    def describe(self) -> dict[str, Any]:
        return {"*": list(self.stoppers)}

    def anew(self) -> Stopper:
        return CombinedStopper(*(s.anew() for s in self.stoppers)) if type(self) is CombinedStopper else self

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        stops = [bool(stopper(trial_id, result)) for stopper in self.stoppers]
        for stopper in self.stoppers:
            self.messages.extend(stopper.messages)
            stopper.messages.clear()
        return any(stops)

    def stop_all(self) -> bool:
        return any(stopper.stop_all() for stopper in self.stoppers)
