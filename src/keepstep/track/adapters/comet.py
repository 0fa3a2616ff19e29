"""Comet, online or offline."""

from __future__ import annotations

from typing import Any

import comet_ml

from keepstep.track.general import GeneralTracker, on_main_process
from keepstep.track.values import plain_config, texts

__all__ = ["CometMLTracker"]


class CometMLTracker(GeneralTracker):
    """Logs to a Comet experiment; a resumed training goes on in the same one.

    Its key is made of the run's id.

    Args:
        run_name: the Comet project.
        kwargs: for `comet_ml.start`; `online=False` writes an archive to upload later.
    """

    name = "comet_ml"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self._kwargs = kwargs
        self._key = ""
        self._experiment: Any = None

    @property
    def tracker(self) -> Any:
        """The experiment; None before `start`."""
        return self._experiment

    def begin(self, run: str, *, continued: bool) -> None:
        self._key = f"keepstep{run}{run}"[:50]  # Comet wants 32 to 50 letters and digits

    @on_main_process
    def start(self) -> None:
        own = {"experiment_key": self._key} if self._key else {}
        self._experiment = comet_ml.start(project_name=self.run_name, **{**own, **self._kwargs})

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._experiment.log_parameters(texts(plain_config(values, tracker=self.name)))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers and dicts of numbers as metrics, strings as other values.

        Args:
            values: by name; others are left out.
            step: of the run.
            kwargs: for `log_metric`, `log_metrics` or `log_other`.
        """
        for name, value in values.items():
            if isinstance(value, int | float):
                self._experiment.log_metric(name, value, step=step, **kwargs)
            elif isinstance(value, str):
                self._experiment.log_other(name, value, **kwargs)
            elif isinstance(value, dict):
                self._experiment.log_metrics(value, prefix=name, step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: {name: list of arrays or PIL images}.
            step: of the run.
            kwargs: for `log_image`.
        """
        for name, images in values.items():
            for image in images:
                self._experiment.log_image(image, name=name, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self._experiment.end()
