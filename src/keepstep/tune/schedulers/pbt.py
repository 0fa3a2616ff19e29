"""Population Based Training: bad trials go on from good ones' checkpoints, with changed hyperparameters."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final, Literal

from keepstep.errors import TrialError, UsageError
from keepstep.tune.experiment.trial import PAUSED, PENDING, RUNNING, Trial
from keepstep.tune.schedulers.arguments import check_flag, check_number
from keepstep.tune.schedulers.base import Controller, Decision
from keepstep.tune.schedulers.explore import Mutations, check_mutations, explored, filled, flat, from_one_seed
from keepstep.tune.schedulers.measured import MeasuredScheduler
from keepstep.tune.schedulers.population import Member, Quantiles, quantiles

__all__ = ["PopulationBasedTraining"]

_SHOWN: Final = 200


class PopulationBasedTraining(MeasuredScheduler):
    """Lets trials of a population that are among the worst take over weights and configuration of the best.

    At every `perturbation_interval` a trial is compared with what the others were worth when they were last
    compared. If it is among the worst, it goes on from the newest checkpoint of one of the best, with that
    one's configuration a step away. Where there are fewer resources than trials, they take turns, an interval
    each.

    A source needs a checkpoint: a class is asked to save one where it is among the best; a function reports
    its own, best at every interval. A checkpoint that somebody is to go on from is never pruned, whatever
    `num_to_keep` says.

    Source: M. Jaderberg et al., Population Based Training of Neural Networks, 2017 (arXiv:1711.09846).

    Args:
        time_attr: how far a trial has come (`MeasuredScheduler`).
        metric: None: what `TuneConfig` says.
        mode: None: what `TuneConfig` says.
        perturbation_interval: in units of `time_attr`.
        burn_in_period: no trial changes before, in units of `time_attr`.
        hyperparam_mutations: {hyperparameter: list of values | search space | function without arguments |
            dict of these}. From a list, a neighbouring value is taken; other numbers are multiplied by one of
            `perturbation_factors`, and may leave the search space that it was drawn from. A trial whose
            configuration lacks one gets it drawn.
        quantile_fraction: how many are the best, and how many the worst; 0 to 0.5.
        resample_probability: how often a value is drawn anew instead.
        perturbation_factors: see there.
        custom_explore_fn: called with a changed configuration, returns the one to use.
        log_config: changes are in the experiment's journal always, from where `PopulationBasedTrainingReplay`
            takes them; there is nothing to switch off.
        require_attrs: False: a result without `metric` or `time_attr` is not looked at, instead of an error.
        synch: True: trials wait for each other at each interval, and all that are among the worst change at
            once.

    Raises:
        UsageError: an argument is not allowed.
    """

    whole_population: ClassVar[bool] = True

    def __init__(
        self,
        time_attr: str = "time_total_s",
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        perturbation_interval: float = 60.0,
        burn_in_period: float = 0.0,
        hyperparam_mutations: Mutations | None = None,
        quantile_fraction: float = 0.25,
        resample_probability: float = 0.25,
        perturbation_factors: Sequence[float] = (1.2, 0.8),
        custom_explore_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        log_config: bool = True,
        require_attrs: bool = True,
        synch: bool = False,
    ) -> None:
        super().__init__(time_attr, metric, mode)
        check_number(self, "perturbation_interval", perturbation_interval, above=0)
        check_number(self, "burn_in_period", burn_in_period, least=0)
        check_number(self, "quantile_fraction", quantile_fraction, least=0, most=0.5)
        check_number(self, "resample_probability", resample_probability, least=0, most=1)
        for name, flag in (("log_config", log_config), ("require_attrs", require_attrs), ("synch", synch)):
            check_flag(self, name, flag)
        self.perturbation_interval = perturbation_interval
        self.burn_in_period = burn_in_period
        self.hyperparam_mutations: Mutations = hyperparam_mutations or {}
        self.quantile_fraction = quantile_fraction
        self.resample_probability = resample_probability
        self.perturbation_factors = perturbation_factors
        self.custom_explore_fn = custom_explore_fn
        self.log_config = log_config
        self.require_attrs = require_attrs
        self.synch = synch
        self._check_exploration()
        self._members: dict[str, Member] = {}
        self._meeting_at = max(perturbation_interval, burn_in_period)
        self._num_perturbations = 0

    def _check_exploration(self) -> None:
        name = type(self).__name__
        if not isinstance(self.hyperparam_mutations, Mapping):
            raise UsageError(
                f"{name} got hyperparam_mutations={self.hyperparam_mutations!r:.{_SHOWN}}; expected a dict"
            )
        if not self.hyperparam_mutations and self.custom_explore_fn is None:
            raise UsageError(
                f"{name} has nothing to change: give it hyperparam_mutations, or custom_explore_fn"
            )
        check_mutations(name, self.hyperparam_mutations)
        factors = self.perturbation_factors
        if not isinstance(factors, list | tuple) or not factors:
            raise UsageError(f"{name} got perturbation_factors={factors!r}; expected a list of numbers > 0")
        for factor in factors:
            check_number(self, "perturbation_factors", factor, above=0)
        if self.custom_explore_fn is not None and not callable(self.custom_explore_fn):
            raise UsageError(
                f"{name} got custom_explore_fn={self.custom_explore_fn!r:.{_SHOWN}}; expected a function "
                "that takes a configuration and returns one"
            )

    # ------------------------------------------------------------------------------------- trials come and go

    def complete_config(self, number: int, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return filled(config, self.hyperparam_mutations, self._generator(f"fill/{number}"))

    def on_trial_add(self, tune_controller: Controller, trial: Trial) -> None:
        self._members.setdefault(trial.trial_id, Member(trial))

    def leave(self, tune_controller: Controller, trial: Trial) -> None:
        if self._members.pop(trial.trial_id, None) is not None and self._all_arrived():
            self._change_all(tune_controller)

    # ------------------------------------------------------------------------------------------------ results

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        measured = self._measure(trial, result)
        if measured is None:
            return "CONTINUE"
        time, score = measured
        member = self._members.setdefault(trial.trial_id, Member(trial))
        start = self._meeting_at if self.synch else member.perturbed_at + self.perturbation_interval
        if time < max(start, self.burn_in_period):
            return "CONTINUE"
        member.score, member.time, member.iteration = score, time, trial.training_iteration
        self.compared(member, result)
        return self._meet(tune_controller, member) if self.synch else self._turn(tune_controller, member)

    def _measure(self, trial: Trial, result: dict[str, Any]) -> tuple[float, float] | None:
        time = self.time_of(trial, result)
        try:
            if time is None:
                raise TrialError(
                    f"{trial} reported a result without {self.time_attr!r}, the time_attr of "
                    f"{type(self).__name__}. Report it with every result, or choose another time_attr"
                )
            return time, self.score_of(trial, result)
        except TrialError as error:
            if self.require_attrs:
                raise
            self.say_once("require_attrs", f"{error} (require_attrs=False: such results are not looked at)")
            return None

    def compared(self, member: Member, result: Mapping[str, Any]) -> None:
        """A member's result is about to be compared, for schedulers that learn from it."""

    def _turn(self, tune_controller: Controller, member: Member) -> Decision:
        """One trial by itself has come to the end of its interval."""
        found = self._quantiles()
        if member not in found.lower or self._ready(member, found.upper):
            member.perturbed_at, member.asked = member.time, False
            if member in found.lower and self._exploit(tune_controller, member, found.upper):
                return "NOOP"
        if any(other.status in (PENDING, PAUSED) for other in tune_controller.get_live_trials()):
            return self.pause(member.trial)
        if member in found.upper and not member.fresh:
            tune_controller.save_trial(member.trial)
        return "CONTINUE"

    def _ready(self, member: Member, upper: Sequence[Member]) -> bool:
        """Whether one of the best has its checkpoint; if not, there may be one with the next result."""
        if not self.saves_when_asked or not upper or any(best.fresh for best in upper):
            return True
        waited, member.asked = member.asked, True
        return waited and any(best.trial.resume_from is not None for best in upper)

    def _quantiles(self) -> Quantiles:
        return quantiles(list(self._members.values()), self.quantile_fraction)

    # --------------------------------------------------------------------------------- all of them at once

    def _all_arrived(self) -> bool:
        return self.synch and bool(self._members) and all(m.arrived for m in self._members.values())

    def _meet(self, tune_controller: Controller, member: Member) -> Decision:
        member.arrived = True
        if not self._all_arrived():
            return self.pause(member.trial)
        found = self._quantiles()
        unsaved = self.saves_when_asked and not all(best.fresh for best in found.upper)
        if found.lower and unsaved and not member.asked:
            # A save is under way, or begins now: it will be there with the next result.
            member.asked, member.arrived = True, False
            tune_controller.save_trial(member.trial)
            return "CONTINUE"
        changed = self._change_all(tune_controller)
        return "NOOP" if member in changed else "CONTINUE"

    def _change_all(self, tune_controller: Controller) -> list[Member]:
        """All trials have arrived: the worst change, and all go on; those that did change are returned."""
        found = self._quantiles()
        changed = [member for member in found.lower if self._exploit(tune_controller, member, found.upper)]
        latest = max(member.time for member in self._members.values())
        while self._meeting_at <= latest:
            self._meeting_at += self.perturbation_interval
        for member in self._members.values():
            member.arrived = member.asked = False
        return changed

    # -------------------------------------------------------------------------------------------- exploiting

    def _exploit(self, tune_controller: Controller, member: Member, upper: Sequence[Member]) -> bool:
        """Let a member go on from one of the best, if one has a checkpoint."""
        trial = member.trial
        generator = self._generator(f"exploit/{self._num_perturbations}/{trial.number}")
        with_checkpoint = [best for best in upper if best.trial.resume_from is not None]
        sources = [best for best in with_checkpoint if best.fresh] or with_checkpoint
        if not sources:
            if upper and not self.saves_when_asked:
                self.say_once(
                    "checkpoint",
                    f"{type(self).__name__}: {trial} is among the worst and goes on as it is: none of the "
                    f"best ({', '.join(str(best.trial) for best in upper)}) has a checkpoint. Report "
                    "checkpoints at least once per perturbation_interval",
                )
            return False
        best = generator.choice(sources)
        source = best.trial.resume_from
        assert source is not None
        config = self._changed(self.new_config(member, best, generator), generator)
        shown = flat(config, self.hyperparam_mutations)
        self.messages.append(
            f"{trial} ({self._worth(member)}) goes on from {best.trial} ({self._worth(best)}) at iteration "
            f"{source.iteration} with {_shown(shown)} instead of "
            f"{_shown(flat(trial.config, self.hyperparam_mutations))}"
        )
        tune_controller.exploit(trial, source, config, {**best.trial.evaluated_params, **shown})
        member.perturbed_at, member.time = best.perturbed_at, best.time
        self._num_perturbations += 1
        return True

    def new_config(self, member: Member, best: Member, generator: random.Random) -> dict[str, Any]:
        """The configuration with which a member goes on from another one, before `custom_explore_fn`."""
        return explored(
            best.trial.config,
            self.hyperparam_mutations,
            generator,
            resample_probability=self.resample_probability,
            factors=tuple(self.perturbation_factors),
        )

    def _changed(self, config: dict[str, Any], generator: random.Random) -> dict[str, Any]:
        if self.custom_explore_fn is None:
            return config
        with from_one_seed(f"custom/{generator.getrandbits(64)}"):
            changed: Any = self.custom_explore_fn(config)
        if not isinstance(changed, dict):
            raise UsageError(
                f"custom_explore_fn returned {changed!r:.{_SHOWN}}; expected the configuration, as a dict"
            )
        return changed

    def _generator(self, purpose: str) -> random.Random:
        return random.Random(f"{type(self).__name__}/{self.seed}/{purpose}")  # noqa: S311

    # ------------------------------------------------------------------------------------------------- turns

    def choose_trial_to_run(self, tune_controller: Controller) -> Trial | None:
        """What was interrupted, then the one that came least far; none that waits for others."""
        live = tune_controller.get_live_trials()
        waiting = [trial for trial in live if trial.status in (PENDING, PAUSED)]
        ready = [trial for trial in waiting if not self._member(trial).arrived]
        if not ready and not any(trial.status == RUNNING for trial in live):
            ready = waiting
        return min(ready, key=self._place, default=None)

    def _place(self, trial: Trial) -> tuple[bool, float, int]:
        return (not self.interrupted(trial), self._member(trial).time, trial.number)

    def _member(self, trial: Trial) -> Member:
        return self._members.get(trial.trial_id) or Member(trial)

    def _worth(self, member: Member) -> str:
        assert member.score is not None, "it was compared"
        return f"{self.metric}={member.score if self.mode == 'max' else -member.score:.4g}"

    def debug_string(self) -> str:
        return f"{type(self).__name__}: {len(self._members)} trials, {self._num_perturbations} changes"


def _shown(config: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value!r:.40}"
        for name, value in config.items()
    )
