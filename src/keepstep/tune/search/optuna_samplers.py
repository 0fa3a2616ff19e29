"""Optuna's samplers by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Final

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from keepstep.errors import MissingPackageError, UsageError

__all__ = ["check_sampler", "made_sampler"]

_SAMPLERS: Final[dict[str, Callable[[int], BaseSampler]]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
    "cmaes": lambda seed: CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "qmc": lambda seed: QMCSampler(
        seed=seed, scramble=True, warn_independent_sampling=False, warn_asynchronous_seeding=False
    ),
    "nsgaii": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
_NEEDS: Final = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",), "qmc": ("scipy",)}
_SHOWN: Final = '"tpe", "gp", "cma-es", "qmc", "nsga-ii", "random"'


def _key(name: str) -> str:
    key = name.lower().replace("-", "").replace("_", "").replace(" ", "").removesuffix("sampler")
    return {"nsga2": "nsgaii", "nsga": "nsgaii", "cma": "cmaes"}.get(key, key)


def check_sampler(sampler: object) -> None:
    """Refuse what is no sampler, or can't run here.

    Raises:
        MissingPackageError: it needs a package that is not installed.
        UsageError: it is neither a sampler nor the name of one.
    """
    if sampler is None or isinstance(sampler, BaseSampler):
        return
    if not isinstance(sampler, str) or _key(sampler) not in _SAMPLERS:
        raise UsageError(
            f"OptunaSearch.sampler is {sampler!r:.200}; expected one of {_SHOWN}, or an object from "
            "optuna.samplers"
        )
    lacking = [package for package in _NEEDS.get(_key(sampler), ()) if find_spec(package) is None]
    if lacking:
        raise MissingPackageError(
            f"optuna's sampler {sampler!r} needs {' and '.join(lacking)}: pip install 'keepstep[optuna]'"
        )


def made_sampler(name: str, seed: int | None) -> BaseSampler:
    """The sampler of this name.

    Args:
        name: one that `check_sampler` let pass.
        seed: any; None: 0.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made: Any = _SAMPLERS[_key(name)]((seed or 0) % 2**32)
    assert isinstance(made, BaseSampler)
    return made
