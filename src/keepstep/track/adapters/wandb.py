"""Weights & Biases, online or offline."""

from __future__ import annotations

from typing import Any

import wandb

from keepstep.track.general import GeneralTracker, on_main_process
from keepstep.track.position import Position
from keepstep.track.values import plain_config

__all__ = ["WandBTracker"]


class WandBTracker(GeneralTracker):
    """Logs to a wandb run; a resumed training goes on in the same one.

    The wandb run's id is that of keepstep's run, and `resume` is "allow", unless `kwargs` say otherwise.
    wandb takes no step twice: rows that an attempt logged after the checkpoint that the run was resumed from
    stay, and are not sent again. They are the same rows as far as the training is deterministic.

    Args:
        run_name: the wandb project.
        kwargs: for `wandb.init`.
    """

    name = "wandb"
    requires_logging_directory = False

    def __init__(self, run_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.run_name = run_name
        self._kwargs = kwargs
        self._id = ""
        self._run: Any = None
        self._steps_there = 0
        self._last_step = -1

    @property
    def tracker(self) -> Any:
        """The `wandb.Run`; None before `start`."""
        return self._run

    def begin(self, run: str, *, continued: bool) -> None:
        self._id = run

    @on_main_process
    def start(self) -> None:
        own = {"id": self._id, "resume": "allow"} if self._id and "resume_from" not in self._kwargs else {}
        self._run = wandb.init(project=self.run_name, **{**own, **self._kwargs})
        self._steps_there = self._run.step

    @on_main_process
    def rewind(self, position: Position) -> None:
        self._steps_there = max(self._steps_there, self._last_step + 1)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._run.config.update(plain_config(values, tracker=self.name), allow_val_change=True)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            values: anything that wandb takes, tables and images too.
            step: of the run.
            kwargs: for `wandb.Run.log`.
        """
        if step is None or step >= self._steps_there:
            self._last_step = self._last_step if step is None else step
            self._run.log(values, step=step, **kwargs)

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: {name: list of arrays or PIL images}.
            step: of the run.
            kwargs: for `wandb.Run.log`.
        """
        images = {name: [wandb.Image(image) for image in several] for name, several in values.items()}
        self.log(images, step=step, **kwargs)

    @on_main_process
    def log_table(
        self,
        table_name: str,
        columns: list[str | int] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a table.

        Args:
            table_name: its name.
            columns: their names, with `data`.
            data: rows.
            dataframe: instead of both.
            step: of the run.
            kwargs: for `wandb.Run.log`.
        """
        table = wandb.Table(columns=columns, data=data, dataframe=dataframe)
        self.log({table_name: table}, step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self._run.finish()
