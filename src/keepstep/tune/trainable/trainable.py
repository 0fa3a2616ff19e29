"""`Trainable`: a trial as a class."""

from __future__ import annotations

import copy
import os
import socket
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keepstep.errors import UsageError
from keepstep.tune import result as names
from keepstep.tune.trainable.bundles import PlacementGroupFactory
from keepstep.tune.trainable.savers import commit, load, make_saver, open_checkpoint
from keepstep.tune.trainable.session import Session, current

if TYPE_CHECKING:
    from keepstep.tune.checkpoint import Checkpoint

__all__ = ["Trainable", "TrainingResult"]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What `Trainable.save` returns and `Trainable.restore` takes.

    Attributes:
        checkpoint: what was committed.
        metrics: the newest result.
    """

    checkpoint: Checkpoint
    metrics: dict[str, Any] = field(default_factory=dict)


class Trainable:
    """Base class of trials that are told when to train, save, load and end.

    Override `setup` and `step`; `save_checkpoint` and `load_checkpoint`, so that a trial can go on after a
    kill, a pause or an exploit; `reset_config`, so that one process runs trial after trial.

    Args:
        config: the trial's configuration.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config if config is not None else {}
        self._session: Session | None = current()
        self._logdir: str | None = None
        self._last_result: dict[str, Any] = {}
        self._start_over()
        self.setup(copy.deepcopy(self.config))

    def _start_over(self) -> None:
        self._iteration = 0
        self._time_total = 0.0
        self._time_since_restore = 0.0
        self._iterations_since_restore = 0

    def _resume_at(self, iteration: int, time_total_s: float) -> None:
        self._start_over()
        self._iteration, self._time_total = iteration, time_total_s

    # ----------------------------------------------------------------------------------- to override

    def setup(self, config: dict[str, Any]) -> None:
        """Make what is trained.

        Args:
            config: a copy of the trial's configuration; further arguments come from `with_parameters`.
        """

    def step(self) -> dict[str, Any]:
        """Train a while, between seconds and minutes say.

        Returns:
            A result. `done=True` in it ends the trial, `should_checkpoint=True` saves a checkpoint.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(); override it")

    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        """Save what `load_checkpoint` needs.

        Args:
            checkpoint_dir: an empty directory, to write files into.

        Returns:
            None or `checkpoint_dir`: the files there are the checkpoint. A dict: a state as
            `keepstep.Store.save` takes it, and `load_checkpoint` gets it back.
        """
        raise NotImplementedError(f"{type(self).__name__} has no save_checkpoint(); override it")

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from a checkpoint; called after `setup` or `reset_config`.

        Args:
            checkpoint: the directory, or the dict, that `save_checkpoint` left; don't write into the former.
        """
        raise NotImplementedError(f"{type(self).__name__} has no load_checkpoint(); override it")

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, in the same process.

        Args:
            new_config: its configuration; `self.config` is it already.

        Returns:
            Whether that worked; False (default): a new process is started instead.
        """
        return False

    def cleanup(self) -> None:
        """Free what was taken; called once, when the trial ends, even by an error."""

    def log_result(self, result: dict[str, Any]) -> None:
        """Do something with each result, in the trial's process."""

    def _export_model(self, export_formats: list[str], export_dir: str) -> dict[str, str]:
        """Write the model to `export_dir`; return {format: path} of what was written."""
        return {}

    @classmethod
    def default_resource_request(
        cls, config: dict[str, Any]
    ) -> PlacementGroupFactory | dict[str, float] | None:
        """What a trial with this configuration holds while it runs; None: one CPU."""
        del config
        return None

    @classmethod
    def resource_help(cls, config: dict[str, Any]) -> str:
        """How to say what a trial needs, for people."""
        del config
        return ""

    # -------------------------------------------------------------------------------------- to call

    def train(self) -> dict[str, Any]:
        """Call `step` once.

        Returns:
            Its result, with `training_iteration`, `time_this_iter_s`, `time_total_s`, `time_since_restore`,
            `iterations_since_restore`, `done`, `trial_id`, `date`, `timestamp`, `pid`, `hostname`, `node_ip`
            and `config`.

        Raises:
            UsageError: `step` returned no dict.
        """
        start = time.perf_counter()
        said = self.step()
        if not isinstance(said, dict):
            raise UsageError(
                f"{type(self).__name__}.step() returned {said!r:.100} ({type(said).__name__}); expected a "
                'dict of metrics, as {"loss": 0.5}'
            )
        took = said.get(names.TIME_THIS_ITER_S)
        took = time.perf_counter() - start if took is None else took
        self._iteration += 1
        self._iterations_since_restore += 1
        self._time_total += took
        self._time_since_restore += took
        result = {names.DONE: False, names.TRAINING_ITERATION: self._iteration, **said}
        result |= self.get_auto_filled_metrics(time_this_iter=took, timestamp=said.get(names.TIMESTAMP))
        self.log_result(result)
        self._last_result = result
        return result

    def get_auto_filled_metrics(
        self, *, time_this_iter: float | None = None, timestamp: float | None = None
    ) -> dict[str, Any]:
        """What every result has besides what `step` returned.

        Args:
            time_this_iter: seconds.
            timestamp: seconds since 1970; None: now.
        """
        now = time.time()
        return {
            names.TRIAL_ID: self.trial_id,
            names.DATE: datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d_%H-%M-%S"),
            names.TIMESTAMP: int(now) if timestamp is None else timestamp,
            names.TIME_THIS_ITER_S: time_this_iter,
            names.TIME_TOTAL_S: self._time_total,
            names.PID: os.getpid(),
            names.HOSTNAME: socket.gethostname(),
            names.NODE_IP: "127.0.0.1",
            "config": self.config,
            names.TIME_SINCE_RESTORE: self._time_since_restore,
            names.ITERATIONS_SINCE_RESTORE: self._iterations_since_restore,
        }

    def save(self, checkpoint_dir: str | None = None) -> TrainingResult:
        """Save a checkpoint outside of an experiment, to try the class out.

        Args:
            checkpoint_dir: an empty or new directory for it; None: a temporary one.

        Returns:
            What `restore` takes.
        """
        parent = tempfile.mkdtemp() if checkpoint_dir is None else str(Path(checkpoint_dir).absolute())
        Path(parent).mkdir(parents=True, exist_ok=True)
        saved = commit(self, make_saver(parent, next_checkpoint=self._iteration), metrics={})
        made = open_checkpoint(str(Path(parent, saved.name)))
        return TrainingResult(checkpoint=made, metrics=dict(self._last_result))

    def restore(self, checkpoint_path: TrainingResult | Checkpoint | str) -> None:
        """Go on from what `save` returned, or from a checkpoint's directory.

        Raises:
            UsageError: there is none.
        """
        given = checkpoint_path
        metrics = given.metrics if isinstance(given, TrainingResult) else {}
        given = given.checkpoint if isinstance(given, TrainingResult) else given
        load(self, open_checkpoint(given) if isinstance(given, str | os.PathLike) else given)
        self._resume_at(
            int(metrics.get(names.TRAINING_ITERATION, 0)), float(metrics.get(names.TIME_TOTAL_S, 0))
        )

    def export_model(self, export_formats: list[str] | str, export_dir: str | None = None) -> dict[str, str]:
        """Have `_export_model` write the model.

        Args:
            export_formats: one or more names that it knows.
            export_dir: where to; None: `logdir`.

        Returns:
            {format: path} of what was written.
        """
        formats = [export_formats] if isinstance(export_formats, str) else list(export_formats)
        return self._export_model(formats, export_dir or self.logdir)

    def stop(self) -> None:
        """End: calls `cleanup`."""
        self.cleanup()

    def reset(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, at its beginning; calls `reset_config` and returns what that returns."""
        old = self.config, self._session
        self.config, self._session = new_config, current()
        if not self.reset_config(copy.deepcopy(new_config)):
            self.config, self._session = old
            return False
        self._logdir = None
        self._last_result = {}
        self._start_over()
        return True

    # -------------------------------------------------------------------------------------- to read

    def get_config(self) -> dict[str, Any]:
        """The trial's configuration."""
        return self.config

    @property
    def iteration(self) -> int:
        """How often `train` was called, over all restarts."""
        return self._iteration

    @property
    def training_iteration(self) -> int:
        """How often `train` was called, over all restarts."""
        return self._iteration

    @property
    def time_total_s(self) -> float:
        """Seconds of training, over all restarts."""
        return self._time_total

    @property
    def trial_id(self) -> str:
        """The trial's id; "default" outside of an experiment."""
        return self._session.trial_id if self._session else "default"

    @property
    def trial_name(self) -> str:
        """The trial's name; "default" outside of an experiment."""
        return self._session.trial_name if self._session else "default"

    @property
    def trial_resources(self) -> PlacementGroupFactory | None:
        """What the trial holds; None outside of an experiment."""
        return self._session.resources if self._session else None

    @property
    def logdir(self) -> str:
        """The trial's working directory; a temporary one outside of an experiment."""
        if self._logdir is None:
            self._logdir = self._session.working_dir if self._session else tempfile.mkdtemp()
        return self._logdir
