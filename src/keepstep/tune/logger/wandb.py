"""Weights & Biases: a run for each trial, through the tracker that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keepstep.track.adapters.wandb import WandBTracker
from keepstep.track.values import joined, split_config
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.base import LoggerCallback
from keepstep.tune.result import TRAINING_ITERATION

__all__ = ["WandbLoggerCallback"]


class WandbLoggerCallback(LoggerCallback):
    """Logs each trial to a wandb run of its own; a trial that goes on after a kill goes on in its run.

    The step is `training_iteration`. The API key is wandb's own business (`wandb login`, WANDB_API_KEY).

    Args:
        project: the wandb project.
        group: of the runs; None: the trainable's name.
        excludes: names of metrics and of parts of the configuration that are not sent.
        log_config: whether the configuration is sent again with every start: it may have changed.
        kwargs: for `wandb.init`.
    """

    def __init__(
        self,
        project: str | None = None,
        group: str | None = None,
        excludes: Sequence[str] | None = None,
        log_config: bool = False,
        **kwargs: Any,
    ) -> None:
        self._project = project if project is not None else "keepstep"
        self._group = group
        self._excludes = tuple(excludes or ())
        self._log_config = log_config
        self._kwargs = kwargs
        self._trackers: dict[str, WandBTracker] = {}

    def log_trial_start(self, trial: Trial) -> None:
        tracker = self._trackers.get(trial.trial_id)
        if tracker is None:
            about = {"name": str(trial), "group": self._group or trial.trainable_name}
            tracker = WandBTracker(self._project, **{**about, "reinit": "create_new", **self._kwargs})
            tracker.begin(trial.trial_id, continued=trial.starts > 1)
            tracker.start()
            self._trackers[trial.trial_id] = tracker
        elif not self._log_config:
            return
        tracker.store_init_configuration(self._kept(split_config(trial.config)[0]))

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        tracker = self._trackers.get(trial.trial_id)
        if tracker is not None:
            values = {
                name: value
                for name, value in self._kept(joined(result)).items()
                if isinstance(value, int | float | str)
            }
            tracker.log(values, step=result[TRAINING_ITERATION])

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        tracker = self._trackers.pop(trial.trial_id, None)
        if tracker is not None:
            tracker.tracker.finish(exit_code=int(failed))

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        for tracker in self._trackers.values():
            tracker.finish()
        self._trackers.clear()

    def _kept(self, values: dict[str, Any]) -> dict[str, Any]:
        left_out = self._excludes
        return {
            name: value
            for name, value in values.items()
            if name not in left_out and not name.startswith(tuple(f"{item}/" for item in left_out))
        }
