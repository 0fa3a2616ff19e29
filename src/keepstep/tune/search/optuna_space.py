"""Search spaces as optuna's: each gives the configuration of one of optuna's trials."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from keepstep.errors import UsageError
from keepstep.tune.search.domain import Categorical, Domain, Float, Function, Integer
from keepstep.tune.search.space import Path, flat, shown, variable, variables
from keepstep.tune.search.variants import called, variants

__all__ = ["DefinedByRun", "OptunaDistributions", "SearchSpace", "TuneSpace"]


class SearchSpace(Protocol):
    """Where configurations come from."""

    def suggest(self, study: optuna.Study) -> tuple[optuna.Trial, dict[str, Any], dict[str, Any]]:
        """A new trial, its configuration, and what of it was drawn."""

    def parameters(self, point: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The values of optuna's parameters in a configuration, complete or in part.

        Raises:
            UsageError: it has something that the space has not; `name` says which point it is.
        """

    def distributions(self) -> dict[str, BaseDistribution] | None:
        """Of all parameters; None: that depends on what is drawn."""


@dataclass(frozen=True)
class _Coded:
    """A variable as a parameter of optuna's.

    Attributes:
        distribution: of the parameter.
        decode: the variable's value, of the parameter's.
        encode: and back; None: there is no such value.
    """

    distribution: BaseDistribution
    decode: Callable[[Any], Any]
    encode: Callable[[Any], Any]


def _coded(domain: Domain, path: Path) -> _Coded:
    if isinstance(domain, Categorical) and not domain.is_grid():
        return _coded_choice(domain)
    if isinstance(domain, Float | Integer) and domain.drawn != "normal":
        return _coded_number(domain)
    what, instead = ("a grid", "choice") if domain.is_grid() else ("a number without bounds", "uniform")
    raise UsageError(
        f"param_space has {what} at {shown(path)!r}, from which optuna's samplers cannot draw; use {instead}"
    )


def _coded_choice(domain: Categorical) -> _Coded:
    """By value where optuna tells the values apart, else by position."""
    values = domain.categories
    simple = all(value is None or isinstance(value, bool | int | float | str) for value in values)
    if simple and len(set(values)) == len(values):
        return _Coded(CategoricalDistribution(values), lambda value: value, lambda value: value)

    def position(value: Any) -> int | None:
        at = (at for at, known in enumerate(values) if known is value or bool(known == value))
        return next(at, None)

    return _Coded(CategoricalDistribution(range(len(values))), lambda at: values[at], position)


def _coded_number(domain: Float | Integer) -> _Coded:
    """Multiples of `q` are drawn by which multiple they are, which works for logarithms too."""
    log = domain.drawn == "loguniform"
    if domain.q is None and isinstance(domain, Float):
        assert domain.lower is not None
        assert domain.upper is not None
        between = FloatDistribution(domain.lower, domain.upper, log=log)
        return _Coded(between, float, float)
    if isinstance(domain, Integer):
        step = domain.q or 1
        least, most = domain.indices()
        return _Coded(
            IntDistribution(least, most, log=log), lambda at: at * step, lambda value: value // step
        )
    assert domain.q is not None
    assert domain.lower is not None
    assert domain.upper is not None
    q = domain.q
    whole = IntDistribution(math.ceil(domain.lower / q - 1e-9), math.floor(domain.upper / q + 1e-9), log=log)
    return _Coded(whole, lambda at: float(at * q), lambda value: round(value / q))


class TuneSpace:
    """A `param_space`. Choices may hold variables, and functions may read what was drawn.

    Args:
        space: it.
        seed: what functions draw from `random` and `numpy.random` comes from it.

    Raises:
        UsageError: it holds what optuna can't draw, or nothing to draw.
    """

    def __init__(self, space: Mapping[str, Any], seed: int) -> None:
        self._space = dict(space)
        self._seed = seed
        found = [(path, domain) for path, domain in variables(self._space) if not domain.is_function()]
        if not found:
            raise UsageError(
                "OptunaSearch has nothing to search: param_space holds no variable (uniform, choice, "
                "...), and OptunaSearch was given no space of its own"
            )
        self._coded = {path: _coded(domain, path) for path, domain in found}

    def suggest(self, study: optuna.Study) -> tuple[optuna.Trial, dict[str, Any], dict[str, Any]]:
        trial = study.ask()
        generator = random.Random(f"{self._seed}:{trial.number}")  # noqa: S311
        chosen: dict[Path, int] = {}

        def draw(path: Path, domain: Domain, space: Any) -> Any:
            if isinstance(domain, Function):
                return called(domain, path, space, generator)
            coded = self._coded[path] if not chosen and path in self._coded else _coded(domain, path)
            value = coded.decode(_suggested(trial, _named(path, chosen), coded.distribution))
            if isinstance(domain, Categorical) and isinstance(value, dict | list | tuple):
                chosen[path] = next(at for at, known in enumerate(domain.categories) if known is value)
            return value

        variant = next(variants(self._space, draw))
        return trial, variant.config, variant.evaluated

    def distributions(self) -> dict[str, BaseDistribution]:
        return {shown(path): coded.distribution for path, coded in self._coded.items()}

    def parameters(self, point: Mapping[str, Any], name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, value in self._said(self._space, point, (), name):
            coded = self._coded.get(path)
            if coded is not None:
                found[shown(path)] = self._encoded(coded, path, value, name)
        return found

    def _said(self, space: Any, point: Any, path: Path, name: str) -> Iterator[tuple[Path, Any]]:
        """What a point says of variables; what it says of constants must be what they are."""
        if variable(space) is not None:
            yield path, point
        elif isinstance(space, dict) and isinstance(point, Mapping):
            for key, value in point.items():
                if key in space:
                    yield from self._said(space[key], value, (*path, key), name)
                elif not path and (known := self._by_name(key)) is not None:
                    yield known, value
                else:
                    raise UsageError(
                        f"{name} has {shown((*path, key))!r}, and param_space has not; it has: "
                        f"{', '.join(repr(shown((*path, known))) for known in space)}"
                    )
        elif isinstance(space, list | tuple) and isinstance(point, list | tuple) and len(space) == len(point):
            for at, value in enumerate(point):
                yield from self._said(space[at], value, (*path, at), name)
        elif space is not point and not bool(space == point):
            raise UsageError(
                f"{name} says {shown(path)}={point!r:.100}, which is no variable of param_space but always "
                f"{space!r:.100}"
            )

    def _by_name(self, key: Any) -> Path | None:
        return next((path for path in self._coded if shown(path) == key), None)

    @staticmethod
    def _encoded(coded: _Coded, path: Path, value: Any, name: str) -> Any:
        distribution = coded.distribution
        try:
            parameter = coded.encode(value)
            back = distribution.to_internal_repr(parameter)
        except (TypeError, ValueError):
            parameter = None
            back = None
        fits = back is not None and not math.isnan(back)
        if fits and isinstance(distribution, FloatDistribution | IntDistribution):
            fits = distribution.low <= parameter <= distribution.high
        if not fits:
            raise UsageError(
                f"{name} says {shown(path)}={value!r:.100}, which that variable never is: {distribution}"
            )
        return parameter


def _named(path: Path, chosen: Mapping[Path, int]) -> str:
    """The name of a parameter: its path, with which choice it lies in: "opt[1]/momentum"."""
    parts = [
        f"{key}[{chosen[path[: at + 1]]}]" if path[: at + 1] in chosen else str(key)
        for at, key in enumerate(path)
    ]
    return "/".join(parts)


def _suggested(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)


def _nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}."""
    whole: dict[str, Any] = {}
    for name, value in parameters.items():
        *outer, last = name.split("/")
        inner = whole
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return whole


class OptunaDistributions:
    """{name: one of optuna's distributions}; nested ones by "a/b", or in dicts.

    Raises:
        UsageError: something in it is none.
    """

    def __init__(self, space: Mapping[str, Any]) -> None:
        self._distributions = flat(dict(space))
        for name, value in self._distributions.items():
            if not isinstance(value, BaseDistribution):
                raise UsageError(
                    f"OptunaSearch's space has {value!r:.100} at {name!r}; expected optuna.distributions "
                    "everywhere, or tune.uniform, tune.choice, ... everywhere, or a function of optuna's "
                    "trial"
                )

    def suggest(self, study: optuna.Study) -> tuple[optuna.Trial, dict[str, Any], dict[str, Any]]:
        trial = study.ask(fixed_distributions=self._distributions)
        return trial, _nested(trial.params), dict(trial.params)

    def distributions(self) -> dict[str, BaseDistribution]:
        return dict(self._distributions)

    def parameters(self, point: Mapping[str, Any], name: str) -> dict[str, Any]:
        found = flat(dict(point))
        for key in found:
            if key not in self._distributions:
                raise UsageError(
                    f"{name} has {key!r}, and the space has not; it has: "
                    f"{', '.join(map(repr, self._distributions))}"
                )
        return found


class DefinedByRun:
    """A function that asks one of optuna's trials for values, and may return constants."""

    def __init__(self, function: Callable[[optuna.Trial], dict[str, Any] | None]) -> None:
        self._function = function

    def suggest(self, study: optuna.Study) -> tuple[optuna.Trial, dict[str, Any], dict[str, Any]]:
        trial = study.ask()
        constants = self._function(trial)
        if constants is not None and not (
            isinstance(constants, dict) and all(isinstance(key, str) for key in constants)
        ):
            raise UsageError(
                f"OptunaSearch's space, a function, returned {constants!r:.200}; expected None, or a dict of "
                "constants by name"
            )
        return trial, _nested({**trial.params, **(constants or {})}), dict(trial.params)

    def distributions(self) -> None:
        return None

    def parameters(self, point: Mapping[str, Any], name: str) -> dict[str, Any]:
        return flat(dict(point))
