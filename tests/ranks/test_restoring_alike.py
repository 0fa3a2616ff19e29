"""What one rank alone can't restore, no rank does: on two ranks in one launch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch import nn

from keepstep import Accelerator, Checkpoint, Store
from keepstep.errors import RankFailedError, RestoreError
from keepstep.utils import InitProcessGroupKwargs
from keepstep.world import Ranks


class Counter:
    """Refuses what it is handed when it is told to."""

    def __init__(self) -> None:
        self.value = 0
        self.before_load: Callable[[int], object] = lambda value: None

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before_load(state["value"])
        self.value = state["value"]


def refuse(value: int) -> None:
    if value == 10:  # not what it had before
        raise OSError("the cache of this machine is full")


class Run:
    def __init__(self, place: Path) -> None:
        quick = InitProcessGroupKwargs(timeout=timedelta(seconds=30))
        self.accelerator = Accelerator(cpu=True, project_dir=place, kwargs_handlers=[quick])
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.first, self.counter = Counter(), Counter()
        self.accelerator.register_for_checkpointing(self.first, self.counter)

    def step(self) -> None:
        self.accelerator.backward(self.model(torch.ones(2, 3)).mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.first.value += 1
        self.counter.value += 10

    def held(self) -> str:
        """Everything that a restore changes."""
        made = [self.model.state_dict(), self.optimizer.state_dict(), self.first.value, self.counter.value]
        return repr([*made, self.accelerator.step, torch.get_rng_state().sum()])


def an_object_that_refuses_on_one_rank(folder: Path, rank: int) -> None:
    run = Run(folder / "refused")
    run.step()
    run.accelerator.save_state()
    run.accelerator.save_state(folder / "by hand")
    saved = run.held()
    run.step()
    before = run.held()
    if rank == 1:
        run.counter.before_load = refuse
    error, words = (RestoreError, "Counter") if rank == 1 else (RankFailedError, "rank 1 failed.*Counter")
    for restore in (
        run.accelerator.resume,
        run.accelerator.load_state,
        lambda: run.accelerator.load_state(folder / "by hand"),
    ):
        with pytest.raises(error, match=words):
            restore()
        assert run.held() == before
    run.counter.before_load = lambda value: None
    run.accelerator.resume()
    assert run.held() == saved


def a_store_falls_back_on_all_ranks(folder: Path, rank: int) -> None:
    world = Ranks(timeout_s=30)
    store, counter = Store(folder / "store", world=world), Counter()
    for number in (1, 2):
        counter.value = number
        store.save({"w": torch.full((3,), float(number)), "c": counter}, step=number)
    live, tried = torch.zeros(3), []

    def load(checkpoint: Checkpoint, agree: Callable[[], object]) -> None:
        tried.append(checkpoint.step)
        if rank == 1 and checkpoint.step == 2:
            next(checkpoint.path.glob("w*.safetensors")).write_bytes(b"")
            checkpoint.load("w")  # raises what damage raises, before this rank agrees
        checkpoint.load_into({"w": live, "c": counter}, agree=lambda: (agree(), tried.append("agreed")))

    found = store.load_latest_with(load)
    assert found is not None
    assert (found.step, live.tolist(), counter.value) == (1, [1.0] * 3, 1)
    assert tried == [2, 1, "agreed"], "rank 0 overwrote what rank 1 could not read"


def run(argument: str, rank: int, size: int) -> None:
    for check in (an_object_that_refuses_on_one_rank, a_store_falls_back_on_all_ranks):
        print(check.__name__, flush=True)
        check(Path(argument), rank)


def test_ranks_restore_alike(tmp_path: Path) -> None:
    run_ranks(__file__, "run", 2, tmp_path, timeout_s=100)
