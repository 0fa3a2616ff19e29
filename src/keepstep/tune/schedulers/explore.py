"""How Population Based Training comes to new configurations: filled, drawn anew, perturbed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from keepstep.errors import UsageError
from keepstep.tune.search.sample import Domain

__all__ = ["Mutations", "check_mutations", "explored", "filled", "flat", "from_one_seed"]

Mutations = Mapping[str, Any]
"""{hyperparameter: list of values, `Domain`, function, or such a dict again}."""

_LEGACY_SEEDS = 2**32


def check_mutations(owner: str, mutations: object, path: str = "") -> None:
    """Refuse what can't be explored.

    Raises:
        UsageError: with the place and what is allowed.
    """
    name = f"{owner}.hyperparam_mutations{path}"
    if isinstance(mutations, Mapping):
        for key, value in mutations.items():
            check_mutations(owner, value, f"{path}[{key!r}]")
    elif isinstance(mutations, Domain) and mutations.is_function():
        raise UsageError(
            f"{name} is a sample_from, which needs a whole configuration; use uniform, loguniform, choice, "
            "... or a function without arguments"
        )
    elif isinstance(mutations, list | tuple) and not mutations:
        raise UsageError(f"{name} is empty; expected the allowed values")
    elif not (isinstance(mutations, list | tuple | Domain) or callable(mutations)):
        raise UsageError(
            f"{name} is {mutations!r:.200}; expected a list of values, a search space like uniform(0, 1), a "
            "function without arguments, or a dict of these"
        )


@contextmanager
def from_one_seed(seed: str) -> Iterator[None]:
    """What a user's function draws from `random` and `numpy.random` depends on this seed alone.

    Both generators stand afterwards as they stood before.
    """
    generator = random.Random(seed)  # noqa: S311
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(generator.getrandbits(64))
    np.random.seed(generator.randrange(_LEGACY_SEEDS))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def filled(
    config: Mapping[str, Any], mutations: Mutations, generator: random.Random
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration with values for all hyperparameters that it lacks.

    Returns:
        It, and what was drawn, as {"a/b": value}.
    """
    whole = dict(config)
    drawn: dict[str, Any] = {}
    for key, values in mutations.items():
        if isinstance(values, Mapping):
            inner, found = filled(_inner(whole, key), values, generator)
            whole[key] = inner
            drawn.update({f"{key}/{name}": value for name, value in found.items()})
        elif key not in whole:
            whole[key] = drawn[key] = _draw(values, generator)
    return whole, drawn


def _inner(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    inner = config.get(key, {})
    if not isinstance(inner, Mapping):
        raise UsageError(
            f"hyperparam_mutations has a dict at {key!r}, and the configuration {inner!r:.200}; expected a "
            "dict there, too"
        )
    return inner


def _draw(values: Any, generator: random.Random) -> Any:
    if isinstance(values, Domain):
        return values.sample(random_state=generator)
    if isinstance(values, list | tuple):
        return values[generator.randrange(len(values))]
    with from_one_seed(f"draw/{generator.getrandbits(64)}"):
        return values()


def explored(
    config: Mapping[str, Any],
    mutations: Mutations,
    generator: random.Random,
    *,
    resample_probability: float,
    factors: tuple[float, ...],
) -> dict[str, Any]:
    """A configuration a step away from this one.

    Args:
        config: that a good trial has; it holds all hyperparameters.
        mutations: what may change.
        generator: what is drawn from.
        resample_probability: how often a value is drawn anew.
        factors: one of these multiplies a number that is not; of a list, a neighbour is taken.
    """
    new = copy.deepcopy(dict(config))
    for key, values in mutations.items():
        if isinstance(values, Mapping):
            new[key] = explored(
                config[key], values, generator, resample_probability=resample_probability, factors=factors
            )
        else:
            new[key] = _step(
                config[key], values, generator, generator.random() < resample_probability, factors
            )
    return new


def _step(old: Any, values: Any, generator: random.Random, resample: bool, factors: tuple[float, ...]) -> Any:
    if isinstance(values, list | tuple):
        if resample or old not in values:
            return _draw(values, generator)
        place = values.index(old) + generator.choice((-1, 1))
        return values[min(max(place, 0), len(values) - 1)]
    number = isinstance(old, int | float) and not isinstance(old, bool)
    # What is no number has no neighbour: it is drawn anew, or stays.
    new = _draw(values, generator) if resample else old * generator.choice(factors) if number else old
    if isinstance(old, bool):
        return bool(new)
    return round(new) if isinstance(old, int) else new


def flat(config: Mapping[str, Any], mutations: Mutations, prefix: str = "") -> dict[str, Any]:
    """The hyperparameters that may change, as {"a/b": value}."""
    found: dict[str, Any] = {}
    for key, values in mutations.items():
        if key in config:
            if isinstance(values, Mapping):
                found.update(flat(config[key], values, f"{prefix}{key}/"))
            else:
                found[f"{prefix}{key}"] = config[key]
    return found
