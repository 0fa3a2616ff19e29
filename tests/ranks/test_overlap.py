"""Shards are copied behind the training like other tensors: what writes to them waits, or is found out."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.holding import copies_held
from tests.ranks.spawn import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from keepstep import Accelerator, CheckpointPolicy, Store
from keepstep.errors import BackgroundSaveError, RankFailedError, StateChangedError
from keepstep.utils import FullyShardedDataParallelPlugin
from keepstep.world import Ranks


def together(root: str, rank: int, size: int) -> None:
    _writes_are_found_out(Path(root) / "written", rank)
    _a_step_of_fsdp_is_no_write(Path(root) / "steps")
    _the_optimizer_waits(Path(root) / "run", rank)
    _a_slip_on_one_rank_is_made_good_at_the_next_step(Path(root) / "slips", rank)


WRITES: dict[str, Callable[[Any], object]] = {
    "in place": lambda w: w.add_(1),
    "through a view": lambda w: w.view(-1).mul_(2),
    "to what was detached": lambda w: w.detach().zero_(),
    "to the local part": lambda w: w.to_local().add_(1),
    "to a row of the local part": lambda w: w._local_tensor[0].fill_(7.0),
    "by a raw optimizer": lambda w: torch.optim.SGD([_with_gradient(w)], lr=0.1, foreach=False).step(),
}


def _with_gradient(w: DTensor) -> torch.Tensor:
    w.requires_grad_().grad = w.detach().clone()
    return w


def _writes_are_found_out(root: Path, rank: int) -> None:
    """By one rank; the other hears of it, and none commits."""
    store, mesh = Store(root, world=Ranks(timeout_s=30)), init_device_mesh("cpu", (2,))
    for name, write in WRITES.items():
        w = distribute_tensor(torch.rand(8, 4) + 1, mesh, [Shard(0)])
        with copies_held() as held:
            state = {"w": w, "b": torch.ones(2)}
            pending = store.save_in_background(state, step=1, staging="overlapped", steady=[w])
            assert not held.at_once
            if rank == 1:
                write(w)
        with pytest.raises(BackgroundSaveError) as failure:
            pending.wait()
        expected = StateChangedError if rank == 1 else RankFailedError
        assert isinstance(failure.value.__cause__, expected), (name, failure.value.__cause__)
    assert store.list() == []


def _a_step_of_fsdp_is_no_write(root: Path) -> None:
    """Gathering shards for a forward and a backward, and letting go of what was gathered."""
    store, mesh = Store(root, world=Ranks(timeout_s=30)), init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    with copies_held() as held:
        state = {"model": model, "optimizer": optimizer}
        steady = [*model.parameters(), *(value for of in optimizer.state.values() for value in of.values())]
        pending = store.save_in_background(state, step=1, staging="overlapped", steady=steady)
        optimizer.zero_grad()
        for _ in range(2):
            model(torch.ones(3, 6)).sum().backward()
        assert not held.at_once
        expected = {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}
    pending.wait_staged()
    optimizer.step()
    loaded = pending.wait().load(only="model")["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def _prepared(root: Path) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(
        cpu=True,
        project_dir=root,
        fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2),
        checkpoint_policy=CheckpointPolicy(every_n_steps=2, staging="overlapped"),
    )
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    return (accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1)))


class Average(nn.Module):
    """Of a sharded model, in shards, by operations that torch does not count there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.shards = nn.ParameterList(p.detach().clone() for p in model.parameters())

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            torch._foreach_lerp_(list(self.shards), [p.detach() for p in model.parameters()], 0.5)


def _the_optimizer_waits(root: Path, rank: int) -> None:
    """For the copy of shards too, gradients or not; an average in shards is copied before that."""
    accelerator, model, optimizer = _prepared(root)
    average = Average(model)
    accelerator.register_for_checkpointing(average)
    with copies_held() as held:
        held.opened.set()
        for number in range(1, 5):
            optimizer.zero_grad()
            accelerator.backward(model(torch.ones(2, 8)).square().sum())
            if number == 3:
                assert held.at_once
                threading.Timer(0.2, held.opened.set).start()
            optimizer.step()
            if number == 2:
                kept = [p.detach().full_tensor().clone() for p in model.parameters()]
                kept_average = [p.detach().full_tensor().clone() for p in average.shards]
                held.opened.clear()
            accelerator.checkpoint()
            average.update(model)
        accelerator.wait_for_checkpoint()
    assert accelerator.checkpoint_counts.redone == accelerator.checkpoint_counts.failed == 0
    loaded = Store(root / "checkpoints").list()[0].load()
    assert all(
        torch.equal(loaded["model"][name], p) for name, p in zip(("weight", "bias"), kept, strict=True)
    )
    saved = [loaded["registered_0"][f"shards.{number}"] for number in range(2)]
    assert all(map(torch.equal, saved, kept_average))


def _a_slip_on_one_rank_is_made_good_at_the_next_step(root: Path, rank: int) -> None:
    accelerator, model, optimizer = _prepared(root)
    for number in range(1, 5):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(2, 8)).square().sum())
        optimizer.step()
        with copies_held() if number == 2 else contextlib.nullcontext(), torch.no_grad():
            accelerator.checkpoint()
            if rank == 1 and number == 2:
                model.weight.mul_(0.5)
    accelerator.wait_for_checkpoint()
    steps = [checkpoint.step for checkpoint in Store(root / "checkpoints").list()]
    assert steps == [3, 4], steps  # not 2
    _steps_after_a_rollback_are_saved(root, accelerator, model, optimizer)
    assert accelerator.checkpoint_counts.redone == 1
    dist.barrier()


def _steps_after_a_rollback_are_saved(root: Path, accelerator: Accelerator, *prepared: Any) -> None:
    model, optimizer = prepared
    store = Store(root / "checkpoints")
    accelerator.load_state(str(store.list()[0].path))
    accelerator.backward(model(torch.ones(2, 8)).square().sum())
    optimizer.step()
    accelerator.end_training(finished=True)
    steps = [checkpoint.step for checkpoint in store.list()]
    assert steps == [3, 4, 4], steps


@pytest.mark.timeout(150)
def test_shards_are_copied_behind_the_training(tmp_path: Path) -> None:
    run_ranks(Path(__file__), "together", 2, tmp_path, timeout_s=100)
