"""Whether the ranks made the same model: what is shared among them has to fit."""

from __future__ import annotations

import hashlib
from itertools import zip_longest

import torch

from keepstep.errors import RanksDifferError
from keepstep.world import World

__all__ = ["check_models_alike"]


def check_models_alike(world: World, model: torch.nn.Module) -> None:
    """Compare names, shapes and dtypes of parameters and buffers over the ranks; all ranks call it.

    Raises:
        RanksDifferError: on every rank, naming the first difference.
    """
    if world.size == 1:
        return
    mine = [
        f"{name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    ]
    digests = world.exchange(hashlib.sha256("\n".join(mine).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    descriptions = world.exchange(mine)
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    pairs = zip_longest(descriptions[0], descriptions[other], fillvalue="nothing")
    first, second = next(pair for pair in pairs if pair[0] != pair[1])
    raise RanksDifferError(
        f"Ranks made different models of class {type(model).__name__}: rank 0 has {first}, rank {other} has "
        f"{second}. Build the same model on every rank."
    )
