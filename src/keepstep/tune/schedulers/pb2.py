"""PB2: Population Based Training that chooses new hyperparameters by what it saw, instead of at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from keepstep.errors import UsageError
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.schedulers.base import Controller, Decision
from keepstep.tune.schedulers.explore import flat
from keepstep.tune.schedulers.gaussian_process import Observations, next_point
from keepstep.tune.schedulers.pbt import PopulationBasedTraining
from keepstep.tune.schedulers.population import Member
from keepstep.tune.search.sample import uniform

__all__ = ["PB2"]


class _State(NamedTuple):
    """Where a trial began what it does now."""

    time: float
    score: float
    hyperparameters: tuple[float, ...]


class _Gain(NamedTuple):
    """What a trial gained from there, per unit of time."""

    began: _State
    gain: float


class PB2(PopulationBasedTraining):
    """Population Based Training with bandits: for few trials, and numbers within bounds.

    A trial that takes over another one's checkpoint gets the hyperparameters of which a Gaussian process, of
    what all trials gained so far, expects most, or knows least.

    Source: J. Parker-Holder, V. Nguyen, S. Roberts: Provably Efficient Online Hyperparameter Optimization
    with Population-Based Bandits, NeurIPS 2020 (arXiv:2002.02518).

    Args:
        time_attr: how far a trial has come (`MeasuredScheduler`).
        metric: None: what `TuneConfig` says.
        mode: None: what `TuneConfig` says.
        perturbation_interval: in units of `time_attr`.
        hyperparam_bounds: {hyperparameter: [least, greatest] | dict of these}. A trial whose configuration
            lacks one gets it drawn evenly; whole numbers stay whole.
        quantile_fraction: how many are the best, and how many the worst; 0 to 0.5.
        log_config: as for `PopulationBasedTraining`, like all that follow.
        require_attrs: see there.
        synch: see there.
        custom_explore_fn: see there.

    Raises:
        UsageError: an argument is not allowed.
    """

    def __init__(
        self,
        time_attr: str = "time_total_s",
        metric: str | None = None,
        mode: Literal["min", "max"] | None = None,
        perturbation_interval: float = 60.0,
        hyperparam_bounds: Mapping[str, Any] | None = None,
        quantile_fraction: float = 0.25,
        log_config: bool = True,
        require_attrs: bool = True,
        synch: bool = False,
        custom_explore_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        if not isinstance(hyperparam_bounds, Mapping) or not hyperparam_bounds:
            raise UsageError(
                f"PB2 got hyperparam_bounds={hyperparam_bounds!r:.200}; expected a dict: "
                '{"lr": [0.0001, 0.1], ...}'
            )
        self.hyperparam_bounds = hyperparam_bounds
        self._bounds = _flat_bounds(hyperparam_bounds)
        super().__init__(
            time_attr=time_attr,
            metric=metric,
            mode=mode,
            perturbation_interval=perturbation_interval,
            hyperparam_mutations=_as_domains(hyperparam_bounds),
            quantile_fraction=quantile_fraction,
            custom_explore_fn=custom_explore_fn,
            log_config=log_config,
            require_attrs=require_attrs,
            synch=synch,
        )
        self._began: dict[str, _State] = {}
        self._gains: list[_Gain] = []

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        if trial.trial_id not in self._began:
            measured = self._measure(trial, result)
            if measured is not None:
                self._began[trial.trial_id] = _State(*measured, self._hyperparameters(trial.config))
        return super().on_trial_result(tune_controller, trial, result)

    def compared(self, member: Member, result: Mapping[str, Any]) -> None:
        trial = member.trial
        hyperparameters = self._hyperparameters(trial.config)
        began = self._began[trial.trial_id]._replace(hyperparameters=hyperparameters)
        assert member.score is not None, "it was compared"
        gain = (
            (member.score - began.score) / (member.time - began.time) if member.time > began.time else np.nan
        )
        if np.isfinite(gain):
            self._gains.append(_Gain(began, gain))
        self._began[trial.trial_id] = _State(member.time, member.score, hyperparameters)

    def new_config(self, member: Member, best: Member, generator: random.Random) -> dict[str, Any]:
        from_there = self._began[best.trial.trial_id]
        others = [
            state
            for trial_id, state in self._began.items()
            if trial_id != member.trial.trial_id and trial_id in self._members and np.isfinite(state.score)
        ]
        chosen = next_point(
            self._observed([gain.began for gain in self._gains], [gain.gain for gain in self._gains]),
            self._observed(others, [0.0] * len(others)),
            from_there.time / self.perturbation_interval,
            self._context(from_there),
            len(self._bounds),
            np.random.default_rng(generator.getrandbits(64)),
        )
        config = copy.deepcopy(best.trial.config)
        for (name, (low, high)), part in zip(self._bounds.items(), chosen, strict=True):
            _put(config, name.split("/"), min(max(low + float(part) * (high - low), low), high))
        self._began[member.trial.trial_id] = from_there._replace(
            hyperparameters=self._hyperparameters(config)
        )
        return config

    def _hyperparameters(self, config: Mapping[str, Any]) -> tuple[float, ...]:
        found = flat(config, self.hyperparam_bounds)
        return tuple(float(found[name]) for name in self._bounds)

    def _observed(self, states: list[_State], gains: list[float]) -> Observations:
        points = [[*self._context(state), *self._scaled(state)] for state in states]
        return Observations(
            np.array([state.time / self.perturbation_interval for state in states]),
            np.array(points).reshape(len(states), 1 + len(self._bounds)),
            np.array(gains),
        )

    def _context(self, state: _State) -> NDArray[np.float64]:
        """What the state of a trial says of what it may gain: its score, among all scores."""
        scores = [gain.began.score for gain in self._gains] or [state.score]
        spread = max(scores) - min(scores)
        return np.array([(state.score - min(scores)) / spread if spread > 0 else 0.0])

    def _scaled(self, state: _State) -> list[float]:
        return [
            (value - low) / (high - low) if high > low else 0.0
            for value, (low, high) in zip(state.hyperparameters, self._bounds.values(), strict=True)
        ]


def _flat_bounds(bounds: Mapping[str, Any], path: str = "") -> dict[str, tuple[float, float]]:
    """{"a/b": (least, greatest)}."""
    found: dict[str, tuple[float, float]] = {}
    for key, value in bounds.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            found.update(_flat_bounds(value, f"{name}/"))
            continue
        if not (
            isinstance(value, list | tuple)
            and len(value) == 2
            and all(isinstance(bound, int | float) and np.isfinite(bound) for bound in value)
            and value[0] <= value[1]
        ):
            raise UsageError(
                f"PB2.hyperparam_bounds has {name}={value!r:.200}; expected [least, greatest], two numbers, "
                "or a dict of these"
            )
        found[name] = (float(value[0]), float(value[1]))
    return found


def _as_domains(bounds: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _as_domains(value) if isinstance(value, Mapping) else uniform(*value)
        for key, value in bounds.items()
    }


def _put(config: dict[str, Any], path: list[str], value: float) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = round(value) if isinstance(config[path[-1]], int) else value
