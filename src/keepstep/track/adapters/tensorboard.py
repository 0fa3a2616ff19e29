"""TensorBoard's event files, through torch's writer."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard.writer import SummaryWriter

from keepstep.track.general import GeneralTracker, on_main_process
from keepstep.track.position import Position
from keepstep.track.values import plain_config, texts

__all__ = ["TensorBoardTracker"]


class TensorBoardTracker(GeneralTracker):
    """Writes event files into `logging_dir/run_name`.

    When a run is resumed, TensorBoard is told to drop what was logged after the checkpoint.

    Args:
        run_name: name of the run's directory.
        logging_dir: that it lies in.
        kwargs: for `torch.utils.tensorboard.SummaryWriter`.
    """

    name = "tensorboard"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__()
        self.logging_dir = Path(logging_dir) / run_name
        self._kwargs = kwargs
        self._writer: Any = None

    @property
    def tracker(self) -> Any:
        """The `SummaryWriter`; None before `start`."""
        return self._writer

    @on_main_process
    def start(self) -> None:
        self._wait_for_a_later_name()
        self._writer = SummaryWriter(str(self.logging_dir), **self._kwargs)

    @on_main_process
    def rewind(self, position: Position) -> None:
        # What `purge_step` does for a writer that is being opened, without a second file.
        for event in (
            Event(step=position.next_step, file_version="brain.Event:2"),
            Event(step=position.next_step, session_log=SessionLog(status=SessionLog.START)),
        ):
            self._writer.file_writer.add_event(event)

    def _wait_for_a_later_name(self) -> None:
        """Event files are read in the order of their names, which begin with the second they were made in."""
        names = [path.name.split(".") for path in self.logging_dir.glob("events.out.tfevents.*")]
        last = max((int(parts[3]) for parts in names if parts[3].isdecimal()), default=0)
        while int(time.time()) == last:
            time.sleep(0.05)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        plain = texts(plain_config(values, tracker=self.name))
        self._writer.add_hparams(plain, {}, run_name=".")
        self._writer.flush()

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log numbers as scalars, strings as text, dicts of numbers as several curves in one chart.

        Args:
            values: by name; others are left out.
            step: of the run.
            kwargs: for `add_scalar`, `add_text` or `add_scalars`.
        """
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, global_step=step, **kwargs)
            elif isinstance(value, str):
                self._writer.add_text(name, value, global_step=step, **kwargs)
            elif isinstance(value, dict):
                self._writer.add_scalars(name, value, global_step=step, **kwargs)
        self._writer.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: {name: images, shape (count, channels, height, width) or as `dataformats` says}.
            step: of the run.
            kwargs: for `add_images`.
        """
        for name, images in values.items():
            self._writer.add_images(name, images, global_step=step, **kwargs)

    @on_main_process
    def finish(self) -> None:
        self._writer.close()
