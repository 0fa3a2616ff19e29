"""Whether the ranks made the same model, and save alike: what they share has to fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch

from keepstep.errors import RanksDifferError
from keepstep.world import World

__all__ = ["check_models_alike", "check_saving_alike"]


def check_models_alike(world: World, model: torch.nn.Module, settings: Mapping[str, object]) -> None:
    """Compare names, shapes and dtypes of parameters and buffers, and what is trained, over the ranks.

    All ranks call it.

    Args:
        world: the ranks.
        model: about to be prepared.
        settings: what decides how ranks train together; compared by their texts.

    Raises:
        RanksDifferError: on every rank, naming the first difference.
    """
    if world.size == 1:
        return
    mine = [
        f"{name}: {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        + (" frozen" if isinstance(value, torch.nn.Parameter) and not value.requires_grad else "")
        for name, value in [*model.named_parameters(), *model.named_buffers()]
    ]
    told: list[Any] = world.exchange(
        [
            hashlib.sha256("\n".join(mine).encode()).hexdigest(),
            {name: str(value) for name, value in settings.items()},
        ]
    )
    _check_settings_alike([theirs for _, theirs in told])
    digests = [digest for digest, _ in told]
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


def _check_settings_alike(settings: Sequence[Mapping[str, str]]) -> None:
    for rank, theirs in enumerate(settings):
        for name, value in settings[0].items():
            if theirs[name] != value:
                raise RanksDifferError(
                    f"Ranks are set up differently: {name} is {value} on rank 0, {theirs[name]} on "
                    f"rank {rank}. They would wait for each other, or train different models. Give all of "
                    "them the same arguments, configuration file and environment."
                )


def check_saving_alike(world: World, place: str, policy: object = None) -> None:
    """Compare where, and when, the ranks are about to save; all ranks call it.

    Args:
        world: the ranks.
        place: directory or address of a store or a checkpoint.
        policy: when checkpoints are due; its text says all of it.

    Raises:
        RanksDifferError: on every rank, naming the first one that differs.
    """
    if world.size == 1:
        return
    said = world.exchange([place, repr(policy)], purpose="saving or restoring")
    for rank, (there, policy_there) in enumerate(said):
        if there != said[0][0]:
            raise RanksDifferError(
                f"Ranks name different places for one checkpoint: {said[0][0]} on rank 0, {there} on rank "
                f"{rank}. All ranks write to one directory. If a time or something drawn is in its name, "
                "let rank 0 choose it: keepstep.utils.broadcast_object_list([name])[0]."
            )
        if policy_there != said[0][1]:
            raise RanksDifferError(
                f"Ranks save by different policies: {said[0][1]} on rank 0, {policy_there} on rank {rank}. "
                "Give all of them the same CheckpointPolicy."
            )
