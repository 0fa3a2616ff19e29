"""Ranks with different numbers of batches: what they go on with, and what they are told where they can't."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch.utils.data import DataLoader, TensorDataset

from keepstep import Accelerator
from keepstep import meetings as _meetings
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import CollectiveMismatchError, RankMissingError, RanksDifferError
from keepstep.world import roll_call, standstill

_ROWS = torch.arange(8.0).reshape(4, 2)


def _prepared(**options: Any) -> tuple[Accelerator, Any, Any, Any]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, **options)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def what_was_learned_after_a_block_is_that_of_the_rank_with_most_batches(folder: Path, rank: int) -> None:
    for longest in (0, 1):
        accelerator, model, optimizer, scheduler = _prepared(step_scheduler_with_optimizer=False)

        def steps(
            count: int, a: Any = accelerator, m: Any = model, o: Any = optimizer, s: Any = scheduler
        ) -> None:
            for number in range(count):
                a.backward(m(_ROWS * (number + 1)).square().mean())
                o.step()
                s.step()
                o.zero_grad()

        with accelerator.join_uneven_inputs([model], even_batches=False):
            steps(5 if rank == longest else 2)
        steps(1)
        state = optimizer.state_dict()
        told = [
            accelerator.step,
            scheduler.get_last_lr(),
            state["param_groups"][0]["lr"],
            [state["state"][0][name].flatten().tolist() for name in ("step", "exp_avg", "exp_avg_sq")],
            [parameter.flatten().tolist() for parameter in model.parameters()],
        ]
        everywhere = accelerator._world.exchange(told)
        assert everywhere[0] == everywhere[1]
        assert accelerator.step == 6
        assert state["state"][0]["step"] == 6
        place = accelerator.save_state(folder / f"longest_{longest}")
        saved: Any = Checkpoint.open(place).load()
        assert saved["optimizer"]["state"][0]["exp_avg"].flatten().tolist() == told[3][1]


def who_waits_for_gradients_of_a_rank_that_went_on_is_named(rank: int) -> None:
    accelerator, model, optimizer, _ = _prepared()
    began = time.monotonic()
    for _ in range(3 - rank):
        with pytest.raises(RuntimeError) if accelerator.step == 2 else _nothing():
            accelerator.backward(model(_ROWS).mean())  # for the last one only rank 0 is here
        optimizer.step()
    if rank:
        with pytest.raises(CollectiveMismatchError, match="rank 0: a backward, for the gradients") as caught:
            accelerator.gather(torch.ones(1))
        assert re.search(
            r"rank 1: gather \(call \d+\), at \S*test_uneven.py:\d+ in who_waits", str(caught.value)
        )
        assert "join_uneven_inputs" in str(caught.value)
    assert time.monotonic() - began < 30


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *failure: object) -> None: ...


def _soon() -> None:
    for module in (_meetings, roll_call, standstill):
        module.LOOK_EVERY_S = 0.5  # type: ignore[attr-defined]
    standstill._STANDS_S = 1.0


def ranks_that_are_set_up_differently_are_told_so(rank: int) -> None:
    for options in (
        {"gradient_accumulation_steps": 1 + rank},
        {"mixed_precision": ("no", "bf16")[rank]},
    ):
        with pytest.raises(
            RanksDifferError, match=f"set up differently: {next(iter(options))} is .* on rank 0"
        ):
            _prepared(**options)


def run(argument: str, rank: int, size: int) -> None:
    _soon()
    ranks_that_are_set_up_differently_are_told_so(rank)
    what_was_learned_after_a_block_is_that_of_the_rank_with_most_batches(Path(argument), rank)
    who_waits_for_gradients_of_a_rank_that_went_on_is_named(rank)


def run_apart(argument: str, rank: int, size: int) -> None:
    """A rank that computes is waited for; one that waits elsewhere is not."""
    _soon()
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(TensorDataset(_ROWS), batch_size=1))
    if rank == 0:
        time.sleep(3)
    accelerator.wait_for_everyone()
    with pytest.raises(CollectiveMismatchError, match="wait for each other in different places") as caught:
        list(loader) if rank == 0 else accelerator.gather(torch.ones(1))
    assert "beginning a pass over a loader, at " in str(caught.value)
    assert "gather" in str(caught.value)
    if rank:
        with pytest.raises(RankMissingError, match="lost each other before"):
            accelerator.wait_for_everyone()


def test_ranks_with_different_numbers_of_batches(tmp_path: Path) -> None:
    run_ranks(__file__, "run", 2, tmp_path)


def test_ranks_that_wait_for_each_other_in_different_places() -> None:
    run_ranks(__file__, "run_apart", 2)
