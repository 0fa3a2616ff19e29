"""MLflow: a run for each trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from keepstep.checkpoint.place.registry import is_address
from keepstep.track.values import joined
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.base import LoggerCallback
from keepstep.tune.result import DONE, TIMESTAMP, TRAINING_ITERATION

__all__ = ["MLflowLoggerCallback"]

_TAG = "trial_id"
_METRICS_AT_ONCE = 1000


class MLflowLoggerCallback(LoggerCallback):
    """Logs each trial to an MLflow run of its own; a trial that goes on after a kill goes on in its run.

    Every number in a result becomes a metric, with `training_iteration` as its step.

    Args:
        tracking_uri: of the server, database or directory; None: as MLflow's own settings say.
        registry_uri: of the model registry.
        experiment_name: of the MLflow experiment, made if it isn't there; None: MLflow's default one.
        tags: of every run.
        save_artifact: whether the trial's directory is uploaded when it ends.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        *,
        registry_uri: str | None = None,
        experiment_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        save_artifact: bool = False,
    ) -> None:
        self._client = MlflowClient(tracking_uri, registry_uri)
        self._name = experiment_name
        self._tags = dict(tags or {})
        self._save_artifact = save_artifact
        self._experiment = "0"
        self._runs: dict[str, str] = {}
        self._last: dict[str, int] = {}

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        if self._name is not None:
            found = self._client.get_experiment_by_name(self._name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(self._name)

    def log_trial_start(self, trial: Trial) -> None:
        if trial.trial_id in self._runs:
            return
        wanted = f"tags.{_TAG} = '{trial.trial_id}'"
        found = self._client.search_runs([self._experiment], filter_string=wanted, max_results=1)
        if found:
            self._runs[trial.trial_id] = found[0].info.run_id
            self._last[trial.trial_id] = int(found[0].data.metrics.get(TRAINING_ITERATION, 0))
            return
        tags = {**self._tags, _TAG: trial.trial_id, MLFLOW_RUN_NAME: str(trial)}
        run = self._client.create_run(self._experiment, tags=tags)
        self._runs[trial.trial_id] = run.info.run_id
        params = [
            Param(name, str(value)[:MAX_PARAM_VAL_LENGTH])
            for name, value in joined(trial.config, between=".").items()
        ]
        for first in range(0, len(params), MAX_PARAMS_TAGS_PER_BATCH):
            self._client.log_batch(run.info.run_id, params=params[first : first + MAX_PARAMS_TAGS_PER_BATCH])

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        step = result[TRAINING_ITERATION]
        if trial.trial_id not in self._runs or step <= self._last.get(trial.trial_id, 0):
            return
        self._last[trial.trial_id] = step
        moment_ms = int(result[TIMESTAMP] * 1000)
        metrics = [
            Metric(name, float(value), moment_ms, step)
            for name, value in joined(result).items()
            if isinstance(value, int | float) and name != DONE and not name.startswith("config/")
        ]
        for first in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(
                self._runs[trial.trial_id], metrics=metrics[first : first + _METRICS_AT_ONCE]
            )

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        run = self._runs.pop(trial.trial_id, None)
        if run is None:
            return
        if self._save_artifact and not is_address(trial.path) and Path(trial.path).is_dir():
            self._client.log_artifacts(run, trial.path)
        self._client.set_terminated(run, "FAILED" if failed else "FINISHED")
