"""What came out of an experiment: `Result`, `ResultGrid`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final, overload

from keepstep.checkpoint.place.registry import is_address, open_objects
from keepstep.errors import (
    ExperimentNotFoundError,
    MissingPackageError,
    NoResultError,
    TrialError,
    UsageError,
)
from keepstep.track.values import joined
from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.reading import whole_address
from keepstep.tune.experiment.trial import ERROR, TERMINATED, CheckpointRecord, Trial
from keepstep.tune.logger.encoding import row_of
from keepstep.tune.logger.reading import read_file, read_results
from keepstep.tune.ranking import best_trial, checked, number
from keepstep.tune.result import (
    AUTOMATIC_FIELDS,
    CHECKPOINT_DIR_NAME,
    EXPR_ERROR_FILE,
    EXPR_PARAM_FILE,
    TIME_TOTAL_S,
    TRAINING_ITERATION,
    look_up,
)

__all__ = ["Result", "ResultGrid", "data_frame", "error_of"]

_CHECKPOINT: Final = re.compile(r"(checkpoint_\d+)(/|\Z)", re.ASCII)
_SHOWN: Final = 20


def data_frame(rows: Sequence[Mapping[str, Any]], index: str | None = None) -> Any:
    """Rows as a pandas data frame.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        made = import_module("keepstep.tune.frames").frame(rows, index)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pandas":
            raise
        raise MissingPackageError(
            "data frames need pandas, which is not installed: pip install 'keepstep[pandas]'. Without it, "
            "ResultGrid and Result.metrics hold the same values as dicts"
        ) from None
    return made


class Result:
    """What came out of one trial.

    Attributes:
        metrics: the last result, with the automatic fields; {} if it reported none.
        config: its configuration.
        path: the address of its directory.
        ended_by: who ended the trial: "itself", "stopper", "scheduler", "time budget", "restore" or "error";
            None: it has not ended, or (`from_path`) there is no telling.
    """

    def __init__(
        self,
        *,
        metrics: Mapping[str, Any],
        config: Mapping[str, Any] | None,
        path: str,
        checkpoints: Sequence[tuple[str, Mapping[str, Any]]] = (),
        newest: str | None = None,
        error: Callable[[], TrialError] | None = None,
        ended_by: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.ended_by = ended_by
        self.metrics = dict(metrics)
        self.config = dict(config) if config is not None else None
        self.path = path
        self._checkpoints = [(f"{path}/{name}", found) for name, found in checkpoints]
        self._newest = newest
        self._error = error
        self._options = storage_options

    @classmethod
    def of(cls, trial: Trial, storage_options: Mapping[str, Any] | None = None) -> Result:
        """What a trial has come to."""
        failed = trial.status == ERROR or (trial.error is not None and not trial.is_finished())
        return cls(
            metrics=trial.last_result,
            config=trial.config,
            path=trial.path,
            checkpoints=[(made.name, _metrics_of(made)) for made in trial.checkpoints],
            newest=trial.checkpoints[-1].name if trial.checkpoints else None,
            error=(lambda: error_of(trial)) if failed else None,
            ended_by=trial.ended_by,
            storage_options=storage_options,
        )

    @classmethod
    def from_path(
        cls, path: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
    ) -> Result:
        """What lies in a trial's directory, or below its address in a bucket.

        Args:
            path: `<storage_path>/<experiment>/<trial>`.
            storage_options: for a bucket.

        Raises:
            ExperimentNotFoundError: there is no trial.
        """
        at = whole_address(path)
        params = read_file(at, EXPR_PARAM_FILE, storage_options)
        results = read_results(at, storage_options)
        if params is None and not results:
            raise ExperimentNotFoundError(
                f"{at} holds no trial: neither {EXPR_PARAM_FILE} nor a result is there. Name the directory "
                "of a trial: <storage_path>/<experiment>/<trial>"
            )
        by_name = {result.get(CHECKPOINT_DIR_NAME): result for result in results}
        names = _checkpoints_at(at, storage_options)
        said = read_file(at, EXPR_ERROR_FILE, storage_options)
        failed = said and not (results and results[-1].get("done"))
        return cls(
            metrics=results[-1] if results else {},
            config=json.loads(params) if params is not None else None,
            path=at,
            checkpoints=[(name, by_name.get(name, {})) for name in names],
            newest=names[-1] if names else None,
            error=(lambda: TrialError(str(said).rstrip())) if failed else None,
            storage_options=storage_options,
        )

    @property
    def error(self) -> TrialError | None:
        """Why it failed; None: it didn't."""
        return self._error() if self._error is not None else None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The newest one; None: there is none."""
        return self._open(f"{self.path}/{self._newest}") if self._newest is not None else None

    @property
    def best_checkpoints(self) -> list[tuple[Checkpoint, dict[str, Any]]]:
        """Those that are kept, each with the metrics it was reported with, oldest first."""
        return [(self._open(at), dict(metrics)) for at, metrics in self._checkpoints]

    def _open(self, address: str) -> Checkpoint:
        return Checkpoint(address, storage_options=self._options)

    def get_best_checkpoint(self, metric: str, mode: str) -> Checkpoint | None:
        """The kept checkpoint with the best value of a metric; one without a number doesn't count.

        Args:
            metric: nested ones by "a/b".
            mode: "min" or "max".

        Raises:
            NoResultError: there is no checkpoint, or none with this metric.
            UsageError: the mode is neither.
        """
        metric, way = checked(metric, mode, "all", asked="get_best_checkpoint")
        found = [(number(look_up(metrics, metric)), at) for at, metrics in self._checkpoints]
        sound = [(value, at) for value, at in found if value is not None and value == value]
        if not sound:
            names = sorted({name for _, metrics in self._checkpoints for name in row_of(metrics)})
            have = f"they have: {', '.join(names[:_SHOWN])}" if names else "it has no checkpoint"
            raise NoResultError(f"no checkpoint in {self.path} has a number for {metric!r}; {have}")
        best = (max if way == "max" else min)(sound, key=lambda pair: pair[0])
        return self._open(best[1])

    @property
    def metrics_dataframe(self) -> Any:
        """All results that the trial reported, one a row, nested names joined by "/".

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return data_frame([row_of(result) for result in read_results(self.path, self._options)])

    @property
    def filesystem(self) -> Any:
        """The `pyarrow.fs.FileSystem` that `path` lies in, for scripts that need one.

        Raises:
            MissingPackageError: pyarrow is not installed.
        """
        try:
            arrow = import_module("pyarrow.fs")
        except ModuleNotFoundError:
            raise MissingPackageError(
                "Result.filesystem needs pyarrow, which is not installed: pip install pyarrow. Result.path "
                "and Result.checkpoint work without it"
            ) from None
        return arrow.FileSystem.from_uri(self.path)[0] if is_address(self.path) else arrow.LocalFileSystem()

    def __repr__(self) -> str:
        own = {name: value for name, value in self.metrics.items() if name not in AUTOMATIC_FIELDS}
        failed = f"error={self.error!r:.100}, " if self._error is not None else ""
        return f"Result({failed}metrics={own!r}, path={self.path!r}, checkpoint={self._newest!r})"


def _metrics_of(made: CheckpointRecord) -> dict[str, Any]:
    return {TRAINING_ITERATION: made.iteration, TIME_TOTAL_S: made.time_total_s, **made.metrics}


def error_of(trial: Trial) -> TrialError:
    """Why a trial failed, with its traceback."""
    return TrialError(f"trial {trial} failed: {trial.error}\n{trial.traceback}".rstrip())


def _checkpoints_at(path: str, options: Mapping[str, Any] | None) -> list[str]:
    """Names of a trial's committed checkpoints, oldest first."""
    if is_address(path):
        keys = [found.key for found in open_objects(path, options).list()]
    else:
        keys = [
            f"{found.parent.name}/{found.name}" for found in Path(path).glob("checkpoint_*/manifest.json")
        ]
    names = {match[1] for key in keys if (match := _CHECKPOINT.match(key)) and key.endswith("/manifest.json")}
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


class ResultGrid:
    """What came out of all trials of an experiment, in the order in which they were made.

    Args:
        history: how the experiment stands.
        metric: what counts, if `get_best_result` is not told.
        mode: "min" or "max", likewise.
        storage_options: for a bucket.
    """

    def __init__(
        self,
        history: History,
        *,
        metric: str | None = None,
        mode: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._history = history
        self._trials: Sequence[Trial] = list(history.trials.values())
        self._metric = metric
        self._mode = mode
        self._options = storage_options

    @property
    def history(self) -> History:
        """How the experiment stands."""
        return self._history

    @property
    def experiment_path(self) -> str:
        """The address of the experiment's directory."""
        return self._history.path

    @property
    def filesystem(self) -> Any:
        """As `Result.filesystem`."""
        return Result(metrics={}, config=None, path=self.experiment_path).filesystem

    def __len__(self) -> int:
        return len(self._trials)

    @overload
    def __getitem__(self, i: int) -> Result: ...
    @overload
    def __getitem__(self, i: slice) -> list[Result]: ...
    def __getitem__(self, i: int | slice) -> Result | list[Result]:
        if isinstance(i, slice):
            return [Result.of(trial, self._options) for trial in self._trials[i]]
        return Result.of(self._trials[i], self._options)

    def __iter__(self) -> Iterator[Result]:
        return (Result.of(trial, self._options) for trial in self._trials)

    @property
    def errors(self) -> list[TrialError]:
        """Why those failed that did."""
        return [error_of(trial) for trial in self._trials if trial.status == ERROR]

    @property
    def num_errors(self) -> int:
        """How many trials failed."""
        return sum(trial.status == ERROR for trial in self._trials)

    @property
    def num_terminated(self) -> int:
        """How many ended well."""
        return sum(trial.status == TERMINATED for trial in self._trials)

    def get_best_result(
        self,
        metric: str | None = None,
        mode: str | None = None,
        scope: str = "last",
        filter_nan_and_inf: bool = True,
    ) -> Result:
        """The best trial's result; of an experiment of one trial without a metric, that one's.

        Args:
            metric: nested ones by "a/b"; None: `TuneConfig.metric`.
            mode: "min" or "max"; None: `TuneConfig.mode`.
            scope: "last": by each trial's last result; "all": by its best; "avg", "last-5-avg",
                "last-10-avg": by the mean of all or of its last results.
            filter_nan_and_inf: trials whose value is NaN or infinite don't count.

        Raises:
            NoResultError: no trial has such a value.
            UsageError: metric, mode or scope is missing, or none that there is.
        """
        if len(self._trials) == 1 and (metric or self._metric) is None:
            return self[0]
        metric, way = checked(
            metric or self._metric, mode or self._mode, scope, asked="ResultGrid.get_best_result"
        )
        best = best_trial(self._trials, metric, way, scope, self._results, only_finite=filter_nan_and_inf)
        if best is None:
            raise NoResultError(self._nothing(metric, filter_nan_and_inf))
        return Result.of(best, self._options)

    def _nothing(self, metric: str, only_finite: bool) -> str:
        names = sorted({name for trial in self._trials for name in row_of(trial.last_result)})
        own = [name for name in names if name not in AUTOMATIC_FIELDS]
        if metric in own and only_finite:
            return (
                f"{metric!r} is NaN or infinite, or no number, in every trial of {self.experiment_path}; "
                "filter_nan_and_inf=False takes such trials as well"
            )
        return (
            f"no trial of {self.experiment_path} ({len(self._trials)} trials) reported {metric!r}; they "
            f"reported: {', '.join(own[:_SHOWN]) or 'nothing'}"
        )

    def _results(self, trial: Trial) -> Sequence[Mapping[str, Any]]:
        return read_results(trial.path, self._options)

    def rows(self, filter_metric: str | None = None, filter_mode: str | None = None) -> list[dict[str, Any]]:
        """One flat dict a trial that reported: its result, its configuration below "config/", and "logdir".

        Args:
            filter_metric: take the result with the best value of this metric; None: the last one.
            filter_mode: "min" or "max".

        Raises:
            UsageError: one of the two without the other.
        """
        if (filter_metric is None) != (filter_mode is None):
            raise UsageError(
                f"filter_metric={filter_metric!r} and filter_mode={filter_mode!r} go together: "
                "pass both or none"
            )
        rows = []
        for trial in self._trials:
            result = self._chosen(trial, filter_metric, filter_mode)
            if result:
                config = joined({"config": trial.config})
                rows.append({**row_of(result), **config, "logdir": trial.dirname})
        return rows

    def _chosen(self, trial: Trial, metric: str | None, mode: str | None) -> Mapping[str, Any] | None:
        if metric is None:
            return trial.last_result
        metric, way = checked(metric, mode, "all", asked="ResultGrid.get_dataframe")
        found = [(number(look_up(result, metric)), result) for result in self._results(trial)]
        sound = [(value, result) for value, result in found if value is not None and value == value]
        return (max if way == "max" else min)(sound, key=lambda pair: pair[0])[1] if sound else None

    def get_dataframe(self, filter_metric: str | None = None, filter_mode: str | None = None) -> Any:
        """`rows` as a pandas data frame.

        Raises:
            MissingPackageError: pandas is not installed.
            UsageError: one of the two without the other.
        """
        return data_frame(self.rows(filter_metric, filter_mode))

    def __repr__(self) -> str:
        shown = [repr(result) for result in self[:_SHOWN]]
        more = f"\n  ... and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        return "ResultGrid<[\n  " + ",\n  ".join(shown) + more + "\n]>"
