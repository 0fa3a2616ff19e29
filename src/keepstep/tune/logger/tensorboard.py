"""TensorBoard's event files of each trial, without torch."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Final

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, create_summary_metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from keepstep.checkpoint.place.registry import is_address
from keepstep.track.values import joined
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger.base import LoggerCallback
from keepstep.tune.logger.encoding import parse_lines
from keepstep.tune.result import (
    AUTOMATIC_FIELDS,
    EXPR_RESULT_FILE,
    TIME_THIS_ITER_S,
    TIMESTAMP,
    TRAINING_ITERATION,
)

__all__ = ["TBXLoggerCallback"]

_log = logging.getLogger(__name__)
_SUFFIX: Final = ".keepstep"
_LEFT_OUT: Final = {*AUTOMATIC_FIELDS, "config"} - {TIME_THIS_ITER_S}


class TBXLoggerCallback(LoggerCallback):
    """Writes every number that a trial reports, and its configuration, for TensorBoard.

    The event files lie beside a trial's `result.json`; the step is `training_iteration`. When an experiment
    goes on after a kill, a trial's file is made anew from `result.json`, so no value is missing or twice.

    Args:
        logdir: the directory of the event files, one directory a trial; None: the trials' own. It has to be
            said if trials are stored in a bucket.
    """

    def __init__(self, logdir: str | None = None) -> None:
        self._logdir = logdir
        self._writers: dict[str, EventFileWriter] = {}

    def log_trial_start(self, trial: Trial) -> None:
        if trial.trial_id in self._writers:
            return
        if self._logdir is None and is_address(trial.path):
            _log.warning(
                "TBXLoggerCallback can't write event files to %s; pass it logdir=, a directory", trial.path
            )
            return
        directory = Path(trial.path) if self._logdir is None else Path(self._logdir, trial.dirname)
        for old in directory.glob(f"events.out.tfevents.*{_SUFFIX}"):
            old.unlink()
        self._writers[trial.trial_id] = EventFileWriter(str(directory), flush_secs=5, filename_suffix=_SUFFIX)
        self._write(trial, Event(summary=hparams_pb(_texts(trial.evaluated_params), trial.trial_id)))
        results = Path(trial.path, EXPR_RESULT_FILE)
        if trial.last_result and results.exists():
            for result in parse_lines(results.read_text(encoding="utf-8")):
                self.log_trial_result(0, trial, result)

    def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
        values = joined({name: value for name, value in result.items() if name not in _LEFT_OUT})
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, int | float) and not math.isnan(value)
        ]
        event = Event(
            step=result[TRAINING_ITERATION], wall_time=result[TIMESTAMP], summary=Summary(value=scalars)
        )
        self._write(trial, event)

    def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
        writer = self._writers.get(trial.trial_id)
        if writer is not None:
            ended = SessionEndInfo(status=Status.STATUS_FAILURE if failed else Status.STATUS_SUCCESS)
            about = create_summary_metadata(HParamsPluginData(session_end_info=ended))
            end = Summary.Value(tag=SESSION_END_INFO_TAG, metadata=about)
            self._write(trial, Event(summary=Summary(value=[end])))
            writer.close()
            del self._writers[trial.trial_id]

    def on_experiment_end(self, trials: Any, **info: Any) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _write(self, trial: Trial, event: Event) -> None:
        writer = self._writers.get(trial.trial_id)
        if writer is not None:
            writer.add_event(event)


def _texts(config: dict[str, Any]) -> dict[str, bool | float | str]:
    return {
        name: value if isinstance(value, bool | int | float | str) else repr(value)
        for name, value in joined(config).items()
    }
