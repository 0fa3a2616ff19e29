"""`Callback`: told of everything that happens to trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.experiment.trial import Trial

__all__ = ["Callback"]


class Callback:
    """Base class; override what you need.

    What its methods are given, where they have it:

    - `iteration`: how many times the driver has looked for news.
    - `trials`: all trials.
    - `trial`: the one it is about.
    - `result`: what it reported, with the automatic fields; may be changed in `on_trial_result`:
      `result[SHOULD_CHECKPOINT] = True` asks for a checkpoint, `result["done"] = True` ends the trial.
    - `info`: nothing yet, but for `setup`.

    An exception raised by a callback ends the experiment, with running trials stopped after a checkpoint.
    """

    def setup(self, stop: Any = None, num_samples: int | None = None, **info: Any) -> None:
        """Before anything else: what `RunConfig.stop` and `TuneConfig.num_samples` say.

        `info` holds "total_num_samples": how many trials there will be, grids counted; None: there is no
        telling.
        """

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """The driver is about to look for news."""

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """The driver has dealt with the news."""

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial starts, for the first time or again."""

    def on_trial_restore(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial goes on from a checkpoint."""

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial's checkpoint was committed and written down; after `on_checkpoint`."""

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported."""

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial ended well."""

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed and will be started again."""

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial failed for good."""

    def on_checkpoint(
        self,
        iteration: int,
        trials: list[Trial],
        trial: Trial,
        checkpoint: Checkpoint,
        **info: Any,
    ) -> None:
        """A checkpoint was committed and written down."""

    def on_experiment_end(self, trials: Sequence[Trial], **info: Any) -> None:
        """All is done."""

    def get_state(self) -> Mapping[str, Any] | None:
        """What it has to know after a restart, as JSON: written down with each result if it changed."""
        return None

    def set_state(self, state: Mapping[str, Any]) -> None:
        """What `get_state` said last, after a restart and before anything else but `setup`."""
