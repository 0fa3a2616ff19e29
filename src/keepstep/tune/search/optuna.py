"""`OptunaSearch`: configurations from optuna's samplers, which learn from results."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from keepstep.errors import MissingPackageError, UsageError
from keepstep.tune.result import DEFAULT_METRIC, TRAINING_ITERATION, look_up
from keepstep.tune.search.base import Searcher
from keepstep.tune.search.basic_variant import checked_points
from keepstep.tune.search.space import variables

try:
    import optuna
except ImportError as error:
    raise MissingPackageError(
        "OptunaSearch needs optuna, which is not installed: pip install 'keepstep[optuna]'"
    ) from error

from optuna.study import StudyDirection
from optuna.trial import TrialState

from keepstep.tune.search.optuna_samplers import check_sampler, made_sampler
from keepstep.tune.search.optuna_space import DefinedByRun, OptunaDistributions, SearchSpace, TuneSpace

__all__ = ["OptunaSearch"]

Mode = Literal["min", "max"]
_DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}


@dataclass
class _Asked:
    """A suggestion.

    Attributes:
        trial: optuna's, which waits for its value.
        evaluated: what was drawn.
        last_step: of the newest intermediate value; -1: there is none.
        over: whether optuna was told the value.
    """

    trial: optuna.Trial
    evaluated: dict[str, Any]
    last_step: int = -1
    over: bool = False


class OptunaSearch(Searcher):
    """Asks one of optuna's samplers for configurations, and tells it what came of them.

    All of it stays in memory. After a restart a new object of the same arguments is asked and told the same
    again, and goes on with the same suggestions.

    A trial that fails, or whose metric is NaN in the end, is told as failed; one that was ended early counts
    with its last value. Which trials are ended early is the scheduler's business: optuna's pruners are not
    used. A sampler that walks through a grid ends the experiment when it is done.

    Args:
        space: {name: one of `optuna.distributions`}, or a function that asks an `optuna.Trial` for values
            and may return a dict of constants; "a/b" is b within a. None: `param_space`, where choices may
            hold variables, and `sample_from` may read what was drawn.
        metric: what counts; a list for several objectives. None: what `TuneConfig` says, or the bare number
            that a function reports.
        mode: "min" or "max"; a list for several objectives.
        points_to_evaluate: configurations to try first, complete or in part.
        sampler: "tpe", "gp", "cma-es", "qmc", "nsga-ii" or "random"; or one of `optuna.samplers`, which is
            copied before it is used, and has to be handed over again to `Tuner.restore`: made with the same
            seed, or what it suggests is not what it suggested before. None: "tpe". "gp" imports torch.
        study_name: the name of optuna's study.
        storage: refused: an experiment's journal holds its history.
        seed: of the sampler; None: the experiment's. Not for a sampler that is an object.
        evaluated_rewards: the metric of each of `points_to_evaluate` (a list for several objectives): these
            are not tried, only learned from. They have to be complete.

    Raises:
        MissingPackageError: a sampler needs a package that is not installed.
        UsageError: an argument is none of these, or two contradict each other.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | Any | None = None,
        metric: str | Sequence[str] | None = None,
        mode: Mode | Sequence[Mode] | None = None,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        sampler: str | optuna.samplers.BaseSampler | None = None,
        study_name: str | None = None,
        storage: None = None,
        seed: int | None = None,
        evaluated_rewards: Sequence[Any] | None = None,
    ) -> None:
        self._arguments = {
            "space": space,
            "metric": metric,
            "mode": mode,
            "points_to_evaluate": points_to_evaluate,
            "sampler": sampler,
            "study_name": study_name,
            "seed": seed,
            "evaluated_rewards": evaluated_rewards,
        }
        self._many = _several(metric, mode)
        one = metric if isinstance(metric, str) else None
        super().__init__(one, mode if isinstance(mode, str) else None)
        self._own_space = space
        self._points = checked_points(points_to_evaluate)
        self._rewards = evaluated_rewards
        self._sampler = sampler
        self._study_name = study_name or "optuna"
        self._own_seed = seed
        self._seed = seed
        self._space: SearchSpace | None = None
        self._study: optuna.Study | None = None
        self._param_space: Mapping[str, Any] = {}
        self._asked: dict[str, _Asked] = {}
        self._exhausted = False
        self._check(storage)

    def _check(self, storage: object) -> None:
        check_sampler(self._sampler)
        if storage is not None:
            raise UsageError(
                f"OptunaSearch keeps optuna's study in memory, since the experiment's journal holds its "
                f"history; storage={storage!r:.100} cannot be given"
            )
        if self._own_seed is not None and isinstance(self._sampler, optuna.samplers.BaseSampler):
            raise UsageError(
                f"OptunaSearch was given seed={self._own_seed} and a sampler that is made already: give "
                "the seed to the sampler"
            )
        if self._rewards is not None and len(self._rewards) != len(self._points):
            raise UsageError(
                f"OptunaSearch was given {len(self._rewards)} evaluated_rewards for {len(self._points)} "
                "points_to_evaluate; expected one for each"
            )
        if self._own_space is not None and not isinstance(self._own_space, Mapping):
            if not callable(self._own_space):
                raise UsageError(
                    f"OptunaSearch.space is {self._own_space!r:.200}; expected a dict or a function"
                )
            if self._rewards is not None:
                raise UsageError(
                    "OptunaSearch cannot take evaluated_rewards with a space that is a function, since it "
                    "does not say what there is to draw; give a dict of optuna.distributions"
                )

    def describe(self) -> dict[str, Any]:
        return dict(self._arguments)

    def set_seed(self, seed: int) -> None:
        if self._own_seed is None:
            self._seed = seed

    @property
    def objectives(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._objectives())

    def _objectives(self) -> list[tuple[str, Mode]]:
        if self._many:
            return self._many
        if self.mode is None:
            raise UsageError(
                f"OptunaSearch learns from a metric (it is {self.metric!r}) and has to know its mode, which "
                'is None: give TuneConfig(metric="...", mode="min") or say it to OptunaSearch'
            )
        return [(self.metric or DEFAULT_METRIC, self.mode)]

    def set_search_properties(
        self, metric: str | None, mode: Mode | None, config: Mapping[str, Any], **spec: Any
    ) -> bool:
        """Begin anew, with this search space unless it has its own, and this metric unless it has its own.

        Raises:
            UsageError: there is nothing to search, or something that optuna's samplers can't draw; no mode is
                known; a point to evaluate does not fit.
        """
        if self._many:
            names = [name for name, _ in self._many]
            if metric is not None and metric not in names:
                raise UsageError(
                    f"OptunaSearch was given the metrics {names}, and TuneConfig metric={metric!r}, which "
                    "is none of them"
                )
        else:
            super().set_search_properties(metric, mode, config, **spec)
        self._param_space = dict(config)
        self._begin()
        return True

    def _begin(self) -> None:
        self._asked = {}
        self._space = self._made_space()
        directions = [_DIRECTIONS[mode] for _, mode in self._objectives()]
        sampler = copy.deepcopy(self._sampler)
        if not isinstance(sampler, optuna.samplers.BaseSampler):
            sampler = made_sampler(sampler or "tpe", self._seed)
        with _quiet():
            self._study = optuna.create_study(
                sampler=sampler,
                pruner=optuna.pruners.NopPruner(),
                study_name=self._study_name,
                directions=directions,
            )
        self._exhausted = False
        self._study.stop = self._stop  # type: ignore[method-assign]  # optuna's own works in optimize() alone
        for at, point in enumerate(self._points):
            parameters = self._space.parameters(point, f"points_to_evaluate[{at}]")
            if self._rewards is None:
                self._study.enqueue_trial(parameters)
            else:
                self._study.add_trial(self._known(at, parameters, self._space))

    def _stop(self) -> None:
        """A sampler has walked through its grid."""
        self._exhausted = True

    def _made_space(self) -> SearchSpace:
        own = self._own_space
        if own is None:
            return TuneSpace(self._param_space, self._seed or 0)
        if not isinstance(own, Mapping):
            return DefinedByRun(own)
        if any(True for _ in variables(dict(own))):
            return TuneSpace(own, self._seed or 0)
        return OptunaDistributions(own)

    def _known(self, at: int, parameters: dict[str, Any], space: SearchSpace) -> optuna.trial.FrozenTrial:
        distributions = space.distributions() or {}
        lacking = [name for name in distributions if name not in parameters]
        if lacking:
            raise UsageError(
                f"points_to_evaluate[{at}] says nothing of {', '.join(map(repr, lacking))}; with "
                "evaluated_rewards points have to be complete"
            )
        assert self._rewards is not None
        reward = self._rewards[at]
        values = list(reward) if isinstance(reward, list | tuple) else [reward]
        if len(values) != len(self._objectives()) or not all(map(_is_number, values)):
            raise UsageError(
                f"evaluated_rewards[{at}] is {reward!r:.100}; expected a number for each of {self.objectives}"
            )
        return optuna.create_trial(params=parameters, distributions=distributions, values=values)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._study is None or self._space is None:
            self._begin()
        assert self._study is not None
        assert self._space is not None
        if self._exhausted:
            return self.FINISHED
        trial, config, evaluated = self._space.suggest(self._study)
        self._asked[trial_id] = _Asked(trial, evaluated)
        return config

    def evaluated(self, trial_id: str) -> dict[str, Any]:
        return dict(self._asked[trial_id].evaluated) if trial_id in self._asked else {}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        asked = self._asked.get(trial_id)
        if (
            asked is None or asked.over or self._many
        ):  # optuna has no intermediate values of several objectives
            return
        value = look_up(result, self.objectives[0])
        step = int(result.get(TRAINING_ITERATION, asked.last_step + 1))
        if _is_number(value) and step > asked.last_step:
            asked.trial.report(float(value), step)
            asked.last_step = step

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        asked = self._asked.get(trial_id)
        if asked is None or asked.over:
            return
        asked.over = True
        assert self._study is not None
        values: list[Any] = [look_up(result, name) if result else None for name in self.objectives]
        if not error and all(map(_is_number, values)):
            self._study.tell(asked.trial, [float(value) for value in values])
        elif not error and asked.last_step >= 0 and all(value is None for value in values):
            self._study.tell(asked.trial, state=TrialState.PRUNED)
        else:
            self._study.tell(asked.trial, state=TrialState.FAIL)
            if not error and result:
                wrong = ", ".join(
                    f"{name}={value!r:.50}" for name, value in zip(self.objectives, values, strict=True)
                )
                self.messages.append(
                    f"OptunaSearch counts trial {trial_id} as failed, since it ended with {wrong}; "
                    "expected numbers"
                )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)


def _several(metric: Any, mode: Any) -> list[tuple[str, Mode]]:
    """Several objectives; []: there is one, or it is not known yet."""
    if isinstance(metric, str | None) and isinstance(mode, str | None):
        if mode not in (None, "min", "max"):
            raise UsageError(f'OptunaSearch.mode is {mode!r}; expected "min" or "max", or a list of these')
        return []
    fits = (
        isinstance(metric, list | tuple) and isinstance(mode, list | tuple) and len(metric) == len(mode) > 0
    )
    if not fits or any(one not in ("min", "max") for one in mode) or len(set(metric)) < len(metric):
        raise UsageError(
            f"OptunaSearch was given metric={metric!r} and mode={mode!r}; for several objectives expected "
            'two lists of one length, of metrics and of "min" or "max"'
        )
    return list(zip(metric, mode, strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of each study on stderr."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
