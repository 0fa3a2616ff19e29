"""`ExperimentAnalysis`: what `tune.run` returns, for scripts that use it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.reading import read_experiment, whole_address
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.encoding import row_of
from keepstep.tune.logger.reading import read_results
from keepstep.tune.ranking import best_trial, checked
from keepstep.tune.result import TRAINING_ITERATION, TRIAL_ID
from keepstep.tune.results import Result, ResultGrid, data_frame

__all__ = ["ExperimentAnalysis"]


class ExperimentAnalysis:
    """Looks at the trials of an experiment.

    Args:
        experiment_checkpoint_path: the address of its directory, or its history.
        default_metric: what counts where a method is not told.
        default_mode: "min" or "max", likewise.
        storage_options: for a bucket.

    Attributes:
        trials: all trials, in the order in which they were made.
    """

    def __init__(
        self,
        experiment_checkpoint_path: History | str | os.PathLike[str],
        *,
        default_metric: str | None = None,
        default_mode: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        experiment = experiment_checkpoint_path
        if not isinstance(experiment, History):
            address = whole_address(experiment)
            experiment = History.of(read_experiment(address, storage_options), address)
        self._history = experiment
        self._options = storage_options
        self.trials = list(experiment.trials.values())
        self.default_metric = default_metric
        self.default_mode = default_mode

    @property
    def experiment_path(self) -> str:
        """The address of the experiment's directory."""
        return self._history.path

    # ------------------------------------------------------------------------------------ the best

    def get_best_trial(
        self,
        metric: str | None = None,
        mode: str | None = None,
        scope: str = "last",
        filter_nan_and_inf: bool = True,
    ) -> Trial | None:
        """The best trial; None: none has the metric. Arguments as of `ResultGrid.get_best_result`.

        Raises:
            UsageError: metric, mode or scope is missing, or none that there is.
        """
        if len(self.trials) == 1:
            return self.trials[0]
        metric, way = checked(
            metric or self.default_metric,
            mode or self.default_mode,
            scope,
            asked="ExperimentAnalysis.get_best_trial",
        )
        return best_trial(
            self.trials,
            metric,
            way,
            scope,
            lambda trial: read_results(trial.path, self._options),
            only_finite=filter_nan_and_inf,
        )

    def get_best_config(
        self, metric: str | None = None, mode: str | None = None, scope: str = "last"
    ) -> dict[str, Any] | None:
        """The configuration of the best trial."""
        best = self.get_best_trial(metric, mode, scope)
        return best.config if best is not None else None

    def get_best_checkpoint(
        self, trial: Trial, metric: str | None = None, mode: str | None = None
    ) -> Checkpoint | None:
        """The best of a trial's kept checkpoints; by default the newest. None: it has none.

        Raises:
            NoResultError: it has checkpoints, but none with the metric.
            UsageError: a metric without a mode.
        """
        metric = metric or self.default_metric
        by, way = (TRAINING_ITERATION, "max") if metric is None else (metric, mode or self.default_mode or "")
        result = Result.of(trial, self._options)
        return result.get_best_checkpoint(by, way) if trial.checkpoints else None

    def get_last_checkpoint(
        self, trial: Trial | None = None, metric: str = TRAINING_ITERATION, mode: str = "max"
    ) -> Checkpoint | None:
        """The newest checkpoint of a trial, or of the best one."""
        trial = trial if trial is not None else self.get_best_trial(metric, mode)
        return Result.of(trial, self._options).checkpoint if trial is not None else None

    @property
    def best_trial(self) -> Trial | None:
        """By the last results, with the metric and mode of the experiment."""
        return self.get_best_trial()

    @property
    def best_config(self) -> dict[str, Any] | None:
        """Of `best_trial`."""
        return self.get_best_config()

    @property
    def best_result(self) -> dict[str, Any]:
        """The last result of `best_trial`; {} if there is none."""
        best = self.get_best_trial()
        return dict(best.last_result) if best is not None else {}

    @property
    def best_checkpoint(self) -> Checkpoint | None:
        """The best checkpoint of `best_trial`."""
        best = self.get_best_trial()
        return self.get_best_checkpoint(best) if best is not None else None

    @property
    def best_dataframe(self) -> Any:
        """All results of `best_trial`, as a pandas data frame."""
        best = self.get_best_trial()
        return Result.of(best, self._options).metrics_dataframe if best is not None else data_frame([])

    @property
    def best_result_df(self) -> Any:
        """`best_result` as a pandas data frame of one row."""
        return data_frame([row_of(self.best_result)], TRIAL_ID)

    # ----------------------------------------------------------------------------------- all trials

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """{trial id: its last result}."""
        return {trial.trial_id: trial.last_result for trial in self.trials}

    @property
    def results_df(self) -> Any:
        """The last results of all trials, as a pandas data frame by trial id."""
        return data_frame([row_of(trial.last_result) for trial in self.trials if trial.last_result], TRIAL_ID)

    @property
    def trial_dataframes(self) -> dict[str, Any]:
        """{trial id: all its results as a pandas data frame}."""
        return {trial.trial_id: Result.of(trial, self._options).metrics_dataframe for trial in self.trials}

    def get_all_configs(self, prefix: bool = False) -> dict[str, dict[str, Any]]:
        """{trial id: its configuration}; with `prefix`, names are "config/lr" and the like."""
        start = "config/" if prefix else ""
        return {
            trial.trial_id: {f"{start}{name}": value for name, value in trial.config.items()}
            for trial in self.trials
        }

    def dataframe(self, metric: str | None = None, mode: str | None = None) -> Any:
        """One row a trial, as `ResultGrid.get_dataframe`."""
        grid = ResultGrid(self._history, storage_options=self._options)
        return grid.get_dataframe(metric, mode)
