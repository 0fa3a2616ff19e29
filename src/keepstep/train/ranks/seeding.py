"""Seeds, and random states that are the same on all ranks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from keepstep.errors import UsageError
from keepstep.train.ranks.process import current_world
from keepstep.world import World

__all__ = ["check_rng_type", "set_seed", "synchronize_rng_state", "synchronize_rng_states"]

_MOST_SEED = 2**32 - 1
_TYPES = ("torch", "cuda", "xpu", "mps", "generator")


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed Python's, NumPy's and torch's generators, those of devices included.

    Args:
        seed: 0 to 2**32 - 1.
        device_specific: add the rank's number, so that each rank draws other numbers.
        deterministic: let torch use deterministic algorithms only.

    Raises:
        UsageError: the seed is no such integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise UsageError(f"seed is {seed!r}; expected an integer of 0 to 2**32 - 1")
    number = int(seed) + (current_world().rank if device_specific else 0)
    if not 0 <= number <= _MOST_SEED:
        raise UsageError(
            f"seed is {number}; expected an integer of 0 to 2**32 - 1, which is what NumPy takes"
        )
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 (scripts draw from the global generator)
    torch.manual_seed(number)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_state(rng_type: str | None = None, generator: torch.Generator | None = None) -> None:
    """Bring a random generator of all ranks to the state that it has on rank 0.

    Args:
        rng_type: "torch" (its CPU generator), "cuda" or another kind of device of this machine, or
            "generator".
        generator: which one, for "generator".

    Raises:
        UsageError: an unknown type, a device that is not there, or no generator.
    """
    _synchronize(current_world(), str(rng_type), generator)


def synchronize_rng_states(rng_types: Iterable[str], generator: torch.Generator | None = None) -> None:
    """As `synchronize_rng_state`, for several types."""
    for rng_type in rng_types:
        synchronize_rng_state(rng_type, generator)


def check_rng_type(rng_type: str) -> None:
    """Raise UsageError for what is no type of generators."""
    if rng_type not in _TYPES:
        raise UsageError(f"rng_type is {rng_type!r}; expected one of {', '.join(_TYPES)}")


def _synchronize(world: World, rng_type: str, generator: torch.Generator | None) -> None:
    source = _source(rng_type, generator)
    state = source.get_state() if isinstance(source, torch.Generator) else source.get_rng_state()
    world.broadcast_tensors(state)
    if isinstance(source, torch.Generator):
        source.set_state(state)
    else:
        source.set_rng_state(state)


def _source(rng_type: str, generator: torch.Generator | None) -> Any:
    """What has the state: a generator, or a device's module."""
    if rng_type == "generator":
        if generator is None:
            raise UsageError('rng_type is "generator", and no generator is given: pass generator=...')
        return generator
    if rng_type == "torch":
        return torch.default_generator
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != rng_type:
        here = "no accelerator" if found is None else f"one of kind {found.type!r}"
        raise UsageError(
            f"rng_type is {rng_type!r}; allowed: {', '.join(map(repr, _TYPES))}, and a device's only where "
            f"there is such a device; this process has {here}"
        )
    return torch.get_device_module(found)
