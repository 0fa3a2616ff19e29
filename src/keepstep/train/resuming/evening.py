"""After ranks did different numbers of steps: all go on with what the rank that did most has.

The model itself is brought along by torch's `Join`. What it leaves behind on a rank that had fewer batches
is the optimizer's state, the learning rate, and the loss scale: each rank would train another model then.
"""

from __future__ import annotations

from typing import Any

import torch

from keepstep.train.data.parcels import pack, unpack
from keepstep.train.resuming.state import TrainState
from keepstep.world.standstill import backwards

__all__ = ["even_out"]

_PURPOSE = "join_uneven_inputs"


def even_out(state: TrainState) -> None:
    """Give all ranks the optimizers, schedulers and counters of the rank that did most. All ranks call it.

    Raises:
        RankFailedError: a state there holds something that can't be sent.
    """
    done = [prepared.steps_done for prepared in state.optimizers]
    by_rank = state.world.exchange([backwards.begun, *done], purpose=_PURPOSE)
    most = max(by_rank)
    if all(counts == most for counts in by_rank):
        return
    source = by_rank.index(most)
    mine = state.world.rank == source
    parcel: list[tuple[bytes, torch.Tensor]] = []

    def make() -> bytes:
        parcel.extend([pack(_state_of(state))] if mine else [])
        return b""

    state.world.exchange_bytes(make, _PURPOSE)
    backwards.begun = most[0]
    if mine:
        state.world.scatter(
            [None if rank == source else parcel[0] for rank in range(state.world.size)], source
        )
    else:
        _take_on(state, unpack(*state.world.scatter(None, source)), most[1:])


def _state_of(state: TrainState) -> dict[str, Any]:
    return {
        "optimizers": [prepared.state_dict() for prepared in state.optimizers],
        "schedulers": [prepared.state_dict() for prepared in state.schedulers],
        "precision": state.precision.state_dict(),
        "window": state.window.state_dict(),
    }


def _take_on(state: TrainState, told: dict[str, Any], steps_done: list[int]) -> None:
    for prepared, its_state, steps in zip(state.optimizers, told["optimizers"], steps_done, strict=True):
        prepared.load_state_dict(its_state)
        prepared.steps_done = steps
    for scheduler, its_state in zip(state.schedulers, told["schedulers"], strict=True):
        scheduler.load_state_dict(its_state)
    if told["precision"] is not None:
        state.precision.load_state_dict(told["precision"])
    state.window.load_state_dict(told["window"])
