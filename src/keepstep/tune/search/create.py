"""Searchers by name."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.search.base import Searcher

__all__ = ["NOT_HERE", "create_searcher", "missing"]

_CLASSES: Final = {
    "variant_generator": ("keepstep.tune.search.basic_variant", "BasicVariantGenerator"),
    "random": ("keepstep.tune.search.basic_variant", "BasicVariantGenerator"),
    "optuna": ("keepstep.tune.search.optuna", "OptunaSearch"),
}
NOT_HERE: Final = {
    "ax": "AxSearch",
    "bayesopt": "BayesOptSearch",
    "bohb": "TuneBOHB",
    "hebo": "HEBOSearch",
    "hyperopt": "HyperOptSearch",
    "nevergrad": "NevergradSearch",
    "zoopt": "ZOOptSearch",
}
"""Searchers of `ray.tune` that keepstep has not: {name: class}."""


def missing(name: str) -> UsageError:
    """The error for a searcher that keepstep has not."""
    return UsageError(
        f"keepstep has no {name}. There are: BasicVariantGenerator (grids and random search; "
        f'{_by_name("BasicVariantGenerator")}) and OptunaSearch ("optuna"), with the samplers TPE, GP, '
        "CMA-ES, QMC and NSGA-II; or derive one from keepstep.tune.search.Searcher"
    )


def _by_name(kind: str) -> str:
    return ", ".join(f'"{name}"' for name, (_, home) in _CLASSES.items() if home == kind)


def create_searcher(search_alg: str, **kwargs: Any) -> Searcher:
    """A searcher by name.

    Args:
        search_alg: "random" (also "variant_generator"), or "optuna".
        kwargs: its arguments; `metric` and `mode` may be given to any.

    Raises:
        MissingPackageError: it needs a package that is not installed.
        UsageError: there is none of that name, or it has no such argument.
    """
    name = search_alg.lower() if isinstance(search_alg, str) else ""
    if name in NOT_HERE:
        raise missing(NOT_HERE[name])
    if name not in _CLASSES:
        raise UsageError(f"there is no searcher {search_alg!r}; allowed: {', '.join(_CLASSES)}")
    module, home = _CLASSES[name]
    kind = getattr(import_module(module), home)
    allowed = list(signature(kind).parameters)
    unknown = [argument for argument in kwargs if argument not in [*allowed, "metric", "mode"]]
    if unknown:
        raise UsageError(
            f"{home} has no argument {', '.join(map(repr, unknown))}; allowed: {', '.join(allowed)}"
        )
    made: Searcher = kind(**{argument: value for argument, value in kwargs.items() if argument in allowed})
    return made
