"""Everybody who is told what happens, but decides nothing: callbacks, and those who write and show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keepstep.tune.callback import Callback
from keepstep.tune.checkpoint import Checkpoint
from keepstep.tune.driver.plain import plain, same
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.trial import CheckpointRecord, Trial

__all__ = ["Audience"]


class Audience:
    """Tells callbacks, in the order in which they were given.

    Args:
        history: the trials.
        callbacks: the user's, and those that write a trial's files.
        storage_options: for a bucket.
    """

    def __init__(
        self,
        history: History,
        callbacks: Sequence[Callback],
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._history = history
        self._callbacks = list(callbacks)
        self._options = storage_options
        self._states: dict[str, Any] = {}
        self._turn = 0

    def setup(self, stop: Any, num_samples: int | None, total_num_samples: int | None) -> None:
        """Before anything else; callbacks that keep a state get the one that was written down last."""
        for number, callback in enumerate(self._callbacks):
            callback.setup(stop=stop, num_samples=num_samples, total_num_samples=total_num_samples)
            state = self._history.callbacks.get(str(number))
            if state is not None:
                callback.set_state(state)
                self._states[str(number)] = state

    def changed_states(self) -> dict[str, Any]:
        """{number of a callback: its state} where it is another than before."""
        changed = {}
        for number, callback in enumerate(self._callbacks):
            state = callback.get_state()
            if state is not None:
                state = plain(dict(state))
                if not same(state, self._states.get(str(number))):
                    changed[str(number)] = self._states[str(number)] = state
        return changed

    def _seen(self) -> dict[str, Any]:
        """What every method is handed, by name: a callback may take it as `**info`."""
        return {"iteration": self._turn, "trials": self._history.all}

    def turn_begins(self) -> None:
        """The driver is about to look for news."""
        self._turn += 1
        for callback in self._callbacks:
            callback.on_step_begin(**self._seen())

    def turn_ends(self) -> None:
        """The driver has dealt with the news."""
        for callback in self._callbacks:
            callback.on_step_end(**self._seen())

    def started(self, trial: Trial, *, restored: bool) -> None:
        """A trial starts; `restored`: from a checkpoint."""
        for callback in self._callbacks:
            callback.on_trial_start(**self._seen(), trial=trial)
            if restored:
                callback.on_trial_restore(**self._seen(), trial=trial)

    def resulted(self, trial: Trial, result: dict[str, Any]) -> None:
        """A trial reported; they may change the result."""
        for callback in self._callbacks:
            callback.on_trial_result(**self._seen(), trial=trial, result=result)

    def checkpointed(self, trial: Trial, made: CheckpointRecord) -> None:
        """A checkpoint was committed and is in the journal."""
        checkpoint = Checkpoint(f"{trial.path}/{made.name}", storage_options=self._options)
        for callback in self._callbacks:
            callback.on_checkpoint(**self._seen(), trial=trial, checkpoint=checkpoint)
            callback.on_trial_save(**self._seen(), trial=trial)

    def completed(self, trial: Trial) -> None:
        """A trial ended well."""
        for callback in self._callbacks:
            callback.on_trial_complete(**self._seen(), trial=trial)

    def failed(self, trial: Trial, *, final: bool) -> None:
        """A trial failed."""
        for callback in self._callbacks:
            tell: Callable[..., None] = callback.on_trial_error if final else callback.on_trial_recover
            tell(**self._seen(), trial=trial)

    def ended(self) -> None:
        """All is done."""
        for callback in self._callbacks:
            callback.on_experiment_end(trials=self._history.all)
