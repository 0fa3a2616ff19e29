"""Callbacks that write down what trials report."""

from __future__ import annotations

import logging
from typing import Any

from keepstep.tune.callback import Callback
from keepstep.tune.experiment.trial import Trial

__all__ = ["CSVLoggerCallback", "JsonLoggerCallback", "LoggerCallback"]

_log = logging.getLogger(__name__)


class LoggerCallback(Callback):
    """Base class of those that log trials; override what you need."""

    def log_trial_start(self, trial: Trial) -> None:
        """A trial starts, for the first time or again."""

    def log_trial_restore(self, trial: Trial) -> None:
        """A trial goes on from a checkpoint."""

    def log_trial_save(self, trial: Trial) -> None:
        """A class saved a checkpoint."""

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        """A trial reported.

        Args:
            iteration: how many times the driver has looked for news.
            trial: which.
            result: with the automatic fields.
        """

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        """A trial ended; `failed`: with an error, and it is not tried again."""

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.log_trial_start(trial)

    def on_trial_restore(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.log_trial_restore(trial)

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.log_trial_save(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self.log_trial_result(iteration, trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.log_trial_end(trial, failed=False)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.log_trial_end(trial, failed=True)


class JsonLoggerCallback(LoggerCallback):
    """Accepted for scripts that name it: `result.json` and `params.json` are always written."""

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        _log.info("JsonLoggerCallback is not needed: result.json and params.json are always written")


class CSVLoggerCallback(LoggerCallback):
    """Accepted for scripts that name it: `progress.csv` is always written, and loses no column."""

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        _log.info("CSVLoggerCallback is not needed: progress.csv is always written")
