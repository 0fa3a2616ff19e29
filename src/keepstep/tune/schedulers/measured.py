"""What schedulers that compare trials have in common: a metric, and a measure of how far a trial has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from inspect import signature
from typing import Any, Final, Literal

from keepstep.errors import TrialError, UsageError
from keepstep.tune.experiment.trial import PENDING, Trial
from keepstep.tune.result import AUTOMATIC_FIELDS, DEFAULT_METRIC, look_up
from keepstep.tune.schedulers.base import Controller, Decision, TrialScheduler

__all__ = ["MeasuredScheduler"]

_MISSING: Final = object()
_NAMES_SHOWN: Final = 12


class MeasuredScheduler(TrialScheduler):
    """Base class of schedulers that compare trials.

    Every argument of a subclass is kept as an attribute of that name.

    Args:
        time_attr: what of a result says how far the trial has come, in any unit that only grows:
            "training_iteration", "time_total_s" or a metric of yours. A result without it is not looked at.
        metric: what counts; nested ones by "a/b". None: what `TuneConfig` says.
        mode: "min" or "max". None: what `TuneConfig` says.

    Raises:
        UsageError: an argument is not allowed.
    """

    def __init__(self, time_attr: str, metric: str | None, mode: Literal["min", "max"] | None) -> None:
        name = type(self).__name__
        if not isinstance(time_attr, str) or not time_attr:
            raise UsageError(
                f"{name} got time_attr={time_attr!r}; expected the name of something in every result, like "
                '"training_iteration" or "time_total_s"'
            )
        if mode not in (None, "min", "max"):
            raise UsageError(f'{name} got mode={mode!r}; expected "min" or "max"')
        if metric is not None and (not isinstance(metric, str) or not metric):
            raise UsageError(f"{name} got metric={metric!r}; expected the name of a metric")
        self.time_attr = time_attr
        self.metric = metric
        self.mode = mode
        self.seed = 0
        self.saves_when_asked = True
        self._said: set[str] = set()

    def describe(self) -> dict[str, Any] | None:
        names = signature(type(self)).parameters
        own = all(hasattr(self, name) for name in names)
        return {name: getattr(self, name) for name in names} if own else None

    def anew(self) -> TrialScheduler:
        arguments = self.describe()
        return self if arguments is None else type(self)(**arguments)

    def set_seed(self, seed: int) -> None:
        self.seed = seed

    def set_search_properties(
        self, metric: str | None, mode: Literal["min", "max"] | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        """Take over what `TuneConfig` says.

        Args:
            metric: None: it says nothing.
            mode: likewise.
            config: the experiment's `param_space`.
            spec: `saves_when_asked=False`: trials are functions, which save only what they report.

        Raises:
            UsageError: metric or mode are said nowhere, or both places contradict each other.
        """
        taken = super().set_search_properties(metric, mode, config, **spec)
        self.saves_when_asked = bool(spec.get("saves_when_asked", True))
        if self.mode is not None and self.metric is None:
            self.metric = DEFAULT_METRIC
        if self.mode is None or self.metric is None:
            name = type(self).__name__
            raise UsageError(
                f"{name} has metric={self.metric!r} and mode={self.mode!r}, and needs both to compare "
                f'trials: say them in TuneConfig(metric=..., mode="min" or "max") or in {name} itself'
            )
        return taken

    def time_of(self, trial: Trial, result: Mapping[str, Any]) -> float | None:
        """How far the trial had come; None: the result does not say.

        Raises:
            TrialError: what it says is no number.
        """
        value = look_up(result, self.time_attr, _MISSING)
        if value is _MISSING:
            self.say_once(
                "time_attr",
                f"{type(self).__name__} looks at no result without its time_attr {self.time_attr!r}: one of "
                f"{trial} holds only {_names(result)}. Report it, or choose another time_attr",
            )
            return None
        return self._number(trial, self.time_attr, value)

    def score_of(self, trial: Trial, result: Mapping[str, Any]) -> float:
        """What a result is worth: the more the better; NaN is the worst there is.

        Raises:
            TrialError: the metric is not there, or no number.
        """
        assert self.metric is not None, "set_search_properties comes first"
        value = look_up(result, self.metric, _MISSING)
        if value is _MISSING:
            raise TrialError(
                f"{trial} reported a result without the metric {self.metric!r}, by which "
                f"{type(self).__name__} compares trials; what it holds: {_names(result)}. Report the metric "
                "with every result, or name another one in TuneConfig(metric=...)"
            )
        number = self._number(trial, self.metric, value)
        if math.isnan(number):
            return -math.inf
        return number if self.mode == "max" else -number

    def _number(self, trial: Trial, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TrialError(
                f"{trial} reported {name}={value!r:.80}; {type(self).__name__} compares by it and expected a "
                "number"
            )
        return float(value)

    def on_trial_complete(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> None:
        self.leave(tune_controller, trial)

    def on_trial_error(self, tune_controller: Controller, trial: Trial) -> None:
        self.leave(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Controller, trial: Trial) -> None:
        self.leave(tune_controller, trial)

    def leave(self, tune_controller: Controller, trial: Trial) -> None:
        """A trial ended, in whatever way: nobody is to wait for it."""

    def pause(self, trial: Trial) -> Decision:
        """To pause the trial that reports, with a word to those whose trials can't go on from there."""
        if not self.saves_when_asked and trial.resume_from is None:
            self.say_once(
                "pause",
                f"{type(self).__name__} pauses {trial}, which has reported no checkpoint: like every trial "
                "without one, it starts from its beginning when it goes on. Report checkpoints: "
                "tune.report(metrics, checkpoint=...)",
            )
        return "PAUSE"

    @staticmethod
    def interrupted(trial: Trial) -> bool:
        """Whether a trial ran until it failed, or the driver was killed: it goes on before others.

        So whatever ran when the driver was killed runs again when it is back.
        """
        return trial.status == PENDING and trial.starts > 0

    def say_once(self, about: str, text: str) -> None:
        """Tell people; only the first time that it is about this."""
        if about not in self._said:
            self._said.add(about)
            self.messages.append(text)


def _names(result: Mapping[str, Any]) -> str:
    names = [repr(name) for name in result if name not in AUTOMATIC_FIELDS]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return (", ".join(names[:_NAMES_SHOWN]) + more) or "no metric at all"
