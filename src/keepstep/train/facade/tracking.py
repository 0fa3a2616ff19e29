"""Trackers: where metrics go."""

from __future__ import annotations

import os

from keepstep.train.facade.base import Facade

__all__ = ["Tracking"]


class Tracking(Facade):
    """Metrics of a run, for people to look at."""

    @property
    def logging_dir(self) -> str | os.PathLike[str] | None:
        """Where trackers write."""
        return self.project_configuration.logging_dir
