"""MLflow: a server, a database or a directory, as its own settings say."""

from __future__ import annotations

import logging
from typing import Any

import mlflow
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

from keepstep.track.general import GeneralTracker, on_main_process
from keepstep.track.position import Position
from keepstep.track.values import joined, plain_config, texts

__all__ = ["MLflowTracker"]

_log = logging.getLogger(__name__)
_TAG = "keepstep.run"


class MLflowTracker(GeneralTracker):
    """Logs to an MLflow run; a resumed training goes on in the same one, found by its tag "keepstep.run".

    MLflow deletes no values: those that an attempt logged after the checkpoint it was resumed from stay, and
    are not logged again. They are the same as far as the training is deterministic.

    Args:
        experiment_name: the MLflow experiment; made if it isn't there.
        logging_dir: where a new experiment keeps its artifacts; None leaves it to MLflow.
        run_id: of an MLflow run to log to, instead of one of its own.
        tags: of a new run, by name.
        nested_run: whether it is a child of the active run.
        run_name: of a new run.
        description: of the run.
    """

    name = "mlflow"
    requires_logging_directory = False

    def __init__(
        self,
        experiment_name: str,
        logging_dir: str | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | None = None,
        nested_run: bool = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__()
        self.experiment_name = experiment_name
        self._artifacts = logging_dir
        self._run_id = run_id
        self._about: dict[str, Any] = {
            "nested": nested_run,
            "run_name": run_name,
            "description": description,
        }
        self._tags = dict(tags or {})
        self._active: Any = None
        self._look = False
        self._steps_there: dict[str, int] = {}

    @property
    def tracker(self) -> Any:
        """The `mlflow.ActiveRun`; None before `start`."""
        return self._active

    def begin(self, run: str, *, continued: bool) -> None:
        self._tags[_TAG] = run

    @on_main_process
    def start(self) -> None:
        found = mlflow.get_experiment_by_name(self.experiment_name)
        experiment = (
            mlflow.create_experiment(self.experiment_name, artifact_location=self._artifacts)
            if found is None
            else found.experiment_id
        )
        known = self._run_id or self._earlier_run(experiment)
        about = self._about if known is None else {**self._about, "run_name": None}
        self._active = mlflow.start_run(run_id=known, experiment_id=experiment, tags=self._tags, **about)
        self._look = known is not None

    def _earlier_run(self, experiment: str) -> str | None:
        if _TAG not in self._tags:
            return None
        wanted = f"tags.`{_TAG}` = '{self._tags[_TAG]}'"
        found = mlflow.MlflowClient().search_runs([experiment], filter_string=wanted, max_results=1)
        return found[0].info.run_id if found else None

    @on_main_process
    def rewind(self, position: Position) -> None:
        self._look = True
        self._steps_there.clear()

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Store the configuration as the run's parameters; MLflow never changes one that it has."""
        plain = texts(plain_config(values, tracker=self.name), between=".")
        params = {name: str(value) for name, value in plain.items()}
        have = mlflow.MlflowClient().get_run(self._active.info.run_id).data.params
        for name, text in params.items():
            if have.get(name, text) != text:
                _log.warning("MLflow keeps %s=%s, and does not take %s", name, have[name], text)
            elif len(text) > MAX_PARAM_VAL_LENGTH:
                _log.warning(
                    "%s is left out: it is %d characters long, and MLflow takes %d",
                    *(name, len(text), MAX_PARAM_VAL_LENGTH),
                )
        new = [
            (name, text)
            for name, text in params.items()
            if name not in have and len(text) <= MAX_PARAM_VAL_LENGTH
        ]
        for first in range(0, len(new), MAX_PARAMS_TAGS_PER_BATCH):
            mlflow.log_params(dict(new[first : first + MAX_PARAMS_TAGS_PER_BATCH]))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers as metrics.

        Args:
            values: by name; nested ones are joined by "/", others are left out.
            step: of the run.
            kwargs: for `mlflow.log_metrics`.
        """
        metrics = {
            name: float(value)
            for name, value in joined(values).items()
            if isinstance(value, int | float) and not self._is_there(name, step)
        }
        if metrics:
            mlflow.log_metrics(metrics, step=step, **kwargs)

    def _is_there(self, name: str, step: int | None) -> bool:
        if not self._look or step is None:
            return False
        if name not in self._steps_there:
            history = mlflow.MlflowClient().get_metric_history(self._active.info.run_id, name)
            self._steps_there[name] = max((entry.step for entry in history), default=-1)
        return step <= self._steps_there[name]

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: {name: list of arrays or PIL images}.
            step: of the run.
            kwargs: for `mlflow.log_image`.
        """
        for name, images in values.items():
            for image in images:
                mlflow.log_image(image, key=name, step=step or 0, **kwargs)

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """Log a matplotlib or plotly figure as an artifact; arguments as of `mlflow.log_figure`."""
        mlflow.log_figure(figure, artifact_file, **save_kwargs)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Log a file as an artifact."""
        mlflow.log_artifact(local_path, artifact_path)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Log a directory's files as artifacts."""
        mlflow.log_artifacts(local_dir, artifact_path)

    @on_main_process
    def finish(self) -> None:
        mlflow.end_run()
