"""Trackers: where metrics go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from keepstep.track.general import GeneralTracker
from keepstep.train.facade.base import Facade

__all__ = ["Tracking"]


class Tracking(Facade):
    """Metrics of a run, for people to look at."""

    def init_trackers(
        self,
        project_name: str,
        config: Mapping[str, Any] | None = None,
        init_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Begin to track. Call it once, before `resume` or after it.

        Args:
            project_name: what trackers call the run, or the project that it is one of.
            config: the run's configuration: numbers, strings, bools, None, paths, lists and dicts of them.
            init_kwargs: {name of a tracker: options for it}, as {"wandb": {"tags": ["first"]}}; those for
                trackers that are not in use are ignored.

        Raises:
            UsageError: it was called before, or options are for a tracker that there is not.
        """
        self._trackers.init(project_name, config, init_kwargs or {})

    def log(
        self,
        values: Mapping[str, Any],
        step: int | None = None,
        log_kwargs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Log values to the run's own log, `project_dir/log.jsonl`, and to every tracker.

        May be called on every rank; the main process's values are logged.

        Args:
            values: {name: number, string, bool, None, tensor of one element, or a dict of these}; whatever
                else a tracker takes.
            step: that the values are of; None for the one after the largest so far.
            log_kwargs: {name of a tracker: options for its `log`}.

        Raises:
            UsageError: trackers were asked for and `init_trackers` was not called.
        """
        self._trackers.log(values, step, log_kwargs or {})

    def get_tracker(self, name: str, unwrap: bool = False) -> Any:
        """A tracker by its name. On ranks that don't track, any call to it does nothing.

        Args:
            name: as in `log_with`, or a tracker's own `name`.
            unwrap: what it drives instead: the wandb run, TensorBoard's writer ...

        Raises:
            UsageError: there is no such tracker.
        """
        return self._trackers.get(name, unwrap=unwrap)

    @property
    def trackers(self) -> list[GeneralTracker]:
        """Every tracker on this rank; empty before `init_trackers`."""
        return self._trackers.all

    @property
    def log_with(self) -> tuple[str, ...]:
        """Names of the trackers that were asked for."""
        return self._trackers.names

    @property
    def logging_dir(self) -> str | os.PathLike[str] | None:
        """Where trackers write."""
        return self.project_configuration.logging_dir
