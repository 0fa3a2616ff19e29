"""`Stopper`: which results end a trial, or the experiment."""

from __future__ import annotations

from functools import cached_property
from typing import Any

__all__ = ["Stopper"]


class Stopper:
    """Base class. It must be a function of what it is told: after a restart it is told everything again."""

    @cached_property
    def messages(self) -> list[str]:
        """What people should be told; the driver takes it out after each call."""
        return []

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether this result ends its trial."""
        raise NotImplementedError

    def stop_all(self) -> bool:
        """Whether the experiment ends."""
        return False
