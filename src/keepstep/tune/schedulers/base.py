"""What a scheduler is told, and what it may do to trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, Literal, Protocol

from keepstep.tune.experiment.trial import CheckpointRecord, Trial
from keepstep.tune.search.base import Suggestible

__all__ = ["Controller", "Decision", "FIFOScheduler", "TrialScheduler"]

Decision = Literal["CONTINUE", "PAUSE", "STOP", "NOOP"]


class Controller(Protocol):
    """What a scheduler sees of the experiment, and does to its trials.

    What is done takes effect together with the decision that the scheduler returns, in one record of the
    journal.
    """

    def get_trials(self) -> Sequence[Trial]:
        """All trials, in the order in which they were made."""

    def get_live_trials(self) -> Sequence[Trial]:
        """Those that have not ended."""

    def pause_trial(self, trial: Trial) -> None:
        """Stop a running trial after a checkpoint; it goes on when the scheduler chooses it again."""

    def unpause_trial(self, trial: Trial) -> None:
        """A paused trial waits to go on, as if it had never been paused."""

    def stop_trial(self, trial: Trial) -> None:
        """End a trial for good: at once if it is paused or waits, after its next result if it runs."""

    def save_trial(self, trial: Trial) -> None:
        """Let the trial that reports save a checkpoint before it trains on.

        Without effect for a function, which saves when it wants to, and if one came with this result.
        """

    def exploit(
        self, trial: Trial, source: CheckpointRecord, config: Mapping[str, Any], evaluated: Mapping[str, Any]
    ) -> None:
        """Let a trial go on from another trial's checkpoint, with a new configuration.

        Until it does, the checkpoint is kept. A running trial is stopped first, without a checkpoint; where
        that is the one that reports, the decision is "NOOP". The source may be the trial's own checkpoint:
        then only the configuration changes.

        Args:
            trial: the one that changes.
            source: the checkpoint it takes over.
            config: complete.
            evaluated: what of it is not fixed, for people.
        """


class TrialScheduler(Suggestible):
    """Decides which trials go on.

    A scheduler must be a function of what it is told, in the order of it, and of its seed: after a restart
    everything is told again, and it has to come to the same decisions. `choose_trial_to_run` must not change
    it.
    """

    CONTINUE: Final = "CONTINUE"
    PAUSE: Final = "PAUSE"
    STOP: Final = "STOP"
    NOOP: Final = "NOOP"

    whole_population: ClassVar[bool] = False
    """Whether trials take turns or wait for each other, so that all of them have to be there before the first
    one starts; with a searcher that learns from results, as many as it gives."""

    def describe(self) -> dict[str, Any] | None:
        """The arguments that make it anew, by name; None: it has to be handed over again.

        They are kept with the experiment, as JSON, so that `Tuner.restore` needs no scheduler. One that JSON
        does not hold, and that is no variable of a search space, has to be handed over again after all.
        """
        return None

    def anew(self) -> TrialScheduler:
        """One of the same arguments that has been told nothing; of a class of your own: this one."""
        return self

    def set_seed(self, seed: int) -> None:
        """The experiment's seed, for a scheduler that was not given one of its own."""

    def complete_config(self, number: int, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the searcher suggested, before a trial is made of it.

        Args:
            number: of the trial.
            config: not to be changed.

        Returns:
            The configuration that the trial gets, and what was drawn for it here, as in `evaluated_params`.
        """
        return config, {}

    def on_trial_add(self, tune_controller: Controller, trial: Trial) -> None:
        """A trial was made."""

    def on_trial_error(self, tune_controller: Controller, trial: Trial) -> None:
        """A trial failed for good."""

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        """A trial reported; `trial.last_result` is this result already.

        Returns:
            What becomes of it.
        """
        raise NotImplementedError

    def on_trial_complete(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> None:
        """A trial ended well by itself or by a stopper, with this last result."""

    def on_trial_remove(self, tune_controller: Controller, trial: Trial) -> None:
        """A trial that waited or was paused was ended by `stop_trial`."""

    def choose_trial_to_run(self, tune_controller: Controller) -> Trial | None:
        """Which of the waiting and paused trials starts next; None: none does now."""
        for trial in tune_controller.get_live_trials():
            if trial.status == "PENDING":
                return trial
        for trial in tune_controller.get_live_trials():
            if trial.status == "PAUSED":
                return trial
        return None

    def debug_string(self) -> str:
        """In one line, for people."""
        return type(self).__name__


class FIFOScheduler(TrialScheduler):
    """Every trial runs to its end, in the order in which they were made."""

    def describe(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        return "CONTINUE"
