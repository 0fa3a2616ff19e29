"""The files of each trial, as a callback: the driver tells it what everybody is told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from keepstep.tune.callback import Callback
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.files import TrialFiles

__all__ = ["FilesCallback"]


class FilesCallback(Callback):
    """Keeps the files of trials up to date; told after all others, so that what they changed is in them.

    Args:
        files: writes them.
    """

    def __init__(self, files: TrialFiles) -> None:
        self.files = files

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.files.start(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self.files.add(trial, result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.files.end(trial)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._failed(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._failed(trial)
        self.files.end(trial)

    def _failed(self, trial: Trial) -> None:
        self.files.failed(trial, trial.traceback or trial.error or "", time.time())

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self.files.flush()

    def on_experiment_end(self, trials: Sequence[Trial], **info: Any) -> None:
        self.files.close()
