"""The Accelerator on two ranks, in one launch: what is wrapped, exchanged, refused and restored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from keepstep import Accelerator, Checkpoint, CheckpointPolicy
from keepstep.errors import NotPreparedError, RanksDifferError, UsageError
from keepstep.state import AcceleratorState, GradientState, PartialState
from keepstep.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProfileKwargs,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 1))


def inputs(rank: int, number: int = 0) -> torch.Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * number + rank))


def gradients_of_both(size: int, numbers: list[int]) -> list[torch.Tensor]:
    """By one process: the mean over ranks of the mean over micro-batches."""
    model = net()
    loss = sum(model(inputs(rank, n)).square().mean() for rank in range(size) for n in numbers)
    (loss / size / len(numbers)).backward()  # type: ignore[operator]
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


def whole(value: Any) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharding() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap="Block")


def a_model_is_wrapped_and_known(folder: Path, rank: int, size: int) -> None:
    accelerator = Accelerator(cpu=True)
    plain = net(seed=rank)
    model = accelerator.prepare(plain)
    assert type(model).__name__ == "DistributedDataParallel"
    assert isinstance(model, DistributedDataParallel)
    assert accelerator.unwrap_model(model) is plain
    assert accelerator.prepare(model) is model
    assert accelerator.prepare(plain) is model
    torch.testing.assert_close(plain[2].weight, net(seed=0)[2].weight)  # rank 0's
    assert accelerator.distributed_type == DistributedType.MULTI_CPU == PartialState().distributed_type
    assert accelerator.use_distributed
    assert (accelerator.process_index, accelerator.num_processes) == (rank, size)
    assert accelerator.is_last_process == (rank == size - 1)
    assert AcceleratorState().num_processes == size
    for number in range(2):
        accelerator.backward(model(inputs(rank, number)).sum())
    assert not model._has_rebuilt_buckets, "a resumed run would round otherwise in its first step"
    frozen = net()
    frozen.requires_grad_(False)
    assert accelerator.prepare(frozen) is frozen
    assert accelerator.prepare_model(net(), evaluation_mode=True).__class__ is nn.Sequential


def gradients_are_exchanged_at_the_end_of_a_window(folder: Path, rank: int, size: int) -> None:
    for shards in (None, sharding()):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=shards)
        model = accelerator.prepare(net())
        for number in (0, 1):
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs(rank, number)).square().mean())
                if shards is None and number == 0:
                    alone = [p.grad.clone() for p in model.parameters()]
        expected = gradients_of_both(size, [0, 1])
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(whole(parameter.grad), gradient)
        assert not torch.allclose(alone[0] * 2, gradients_of_both(size, [0])[0]), "exchanged too early"
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e-3)
        torch.testing.assert_close(norm, torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected])))
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = accelerator.prepare(net())
    with accelerator.accumulate(model):
        accelerator.backward(model(inputs(rank)).square().mean())
    torch.testing.assert_close(
        [p.grad * 2 for p in model.parameters()], gradients_of_both(size, [0]), rtol=1e-5, atol=1e-6
    )
    assert not GradientState().sync_gradients


def a_backward_may_exchange_what_its_forward_did_not(folder: Path, rank: int, size: int) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(net())
    with accelerator.no_sync(model):
        loss = model(inputs(rank)).square().mean()
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(loss)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients_of_both(size, [0]))


def schedulers_step_for_each_rank(folder: Path, rank: int, size: int) -> None:
    for split, expected in ((False, size), (True, 1)):
        accelerator = Accelerator(cpu=True, split_batches=split)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        accelerator.backward(model(inputs(rank)).sum())
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [1 / (1 + expected)]
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(net().parameters(), lr=1.0)
    once = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=3)
    optimizer, once = accelerator.prepare(optimizer, once)
    for _ in range(2):  # four steps, of which the scheduler has three
        once.step()


def what_cannot_work_is_refused_on_every_rank(folder: Path, rank: int, size: int) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(
        RanksDifferError, match=r"rank 0 has weight: float32 \[2, 2\], rank 1 has weight: flo"
    ):
        accelerator.prepare(nn.Linear(2, 2 + rank))
    stranger = accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1))
    with pytest.raises(NotPreparedError, match=r"SGD steps 6 parameters .* belong to no prepared model"):
        stranger.step()
    sharded = Accelerator(cpu=True, fsdp_plugin=sharding(), gradient_accumulation_steps=2, project_dir=folder)
    model = sharded.prepare(net())
    with sharded.accumulate(model):
        sharded.backward(model(inputs(rank)).sum())
    with pytest.raises(UsageError, match="inside an accumulation window"):
        sharded.save_state()
    with (
        pytest.raises(UsageError, match="whole copies of a model"),
        sharded.join_uneven_inputs([model], even_batches=False),
    ):
        pass
    names = FullyShardedDataParallelPlugin(transformer_cls_names_to_wrap=["Blok"])
    with pytest.raises(UsageError, match="has no submodule of such a class"):
        Accelerator(cpu=True, fsdp_plugin=names).prepare(net())


def shards_are_saved_by_their_owners(folder: Path, rank: int, size: int) -> None:
    accelerator = Accelerator(cpu=True, fsdp_plugin=sharding(), project_dir=folder / "shards")
    plain = net()
    before = torch.optim.AdamW(plain.parameters(), lr=0.1)
    model = accelerator.prepare(plain)
    optimizer = accelerator.prepare(before)  # made of what the shards replaced
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert accelerator.distributed_type == DistributedType.FSDP
    assert accelerator.state.is_fsdp2
    accelerator.backward(model(inputs(rank)).square().mean())
    optimizer.step()
    saved = accelerator.save_state()
    held = [whole(p).clone() for p in model.parameters()]
    loaded = Checkpoint.open(saved).load("model")["model"]
    torch.testing.assert_close([loaded[name] for name in plain.state_dict()], held, rtol=0, atol=0)
    again = Accelerator(cpu=True, fsdp_plugin=sharding(), project_dir=folder / "shards")
    other = net(seed=5)
    other, moments = again.prepare(other, torch.optim.AdamW(other.parameters(), lr=0.1))
    assert again.resume() is not None
    torch.testing.assert_close([whole(p) for p in other.parameters()], held, rtol=0, atol=0)
    states = [state["exp_avg"] for state in moments.state.values()]
    assert all(isinstance(state, DTensor) for state in states)
    for _ in range(2):
        for run, stepped, by in ((model, optimizer, accelerator), (other, moments, again)):
            by.backward(run(inputs(rank, 1)).square().mean())
            stepped.step()
            stepped.zero_grad()
    torch.testing.assert_close(
        [whole(p) for p in other.parameters()], [whole(p) for p in model.parameters()], rtol=0, atol=0
    )


def ranks_decide_together_when_to_save(folder: Path, rank: int, size: int) -> None:
    accelerator = Accelerator(
        cpu=True, project_dir=folder / "paced", checkpoint_policy=CheckpointPolicy(every_s=0.05)
    )
    model = net()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    saved = []
    for number in range(40):
        accelerator.backward(model(inputs(rank, number)).square().mean())
        optimizer.step()
        if accelerator.checkpoint() is not None:
            saved.append(number)
    accelerator.wait_for_checkpoint()
    assert len(saved) >= 1
    assert accelerator.gather_for_metrics([saved], use_gather_object=True) == [saved] * size


class Average(nn.Module):
    """Puts another buffer in the place of its own at each forward; DDP sends only the first one to all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


def buffers_of_each_rank_come_back(folder: Path, rank: int, size: int) -> None:
    def make() -> tuple[Accelerator, nn.Module, nn.BatchNorm1d, Average]:
        accelerator = Accelerator(cpu=True, project_dir=folder / "buffers")
        norm, average = nn.BatchNorm1d(6), Average()
        torch.manual_seed(0)
        model = accelerator.prepare(nn.Sequential(average, norm, nn.Linear(6, 1)))
        return accelerator, model, norm, average

    accelerator, model, norm, average = make()
    model(inputs(rank))
    mine = norm.running_mean.clone()  # type: ignore[union-attr]
    accelerator.save_state()
    again, model_again, other, other_average = make()
    again.resume()
    torch.testing.assert_close(other.running_mean, mine, rtol=0, atol=0)
    torch.testing.assert_close(other_average.mean, average.mean, rtol=0, atol=0)
    for of_ranks in (mine, average.mean):
        means = accelerator.gather(of_ranks.unsqueeze(0))
        assert not torch.equal(means[0], means[1])
    torch.testing.assert_close(model_again(inputs(rank)), model(inputs(rank)), rtol=0, atol=0)
    torch.testing.assert_close(other_average.mean, average.mean, rtol=0, atol=0)


def compressed_gradients_go_on(folder: Path, rank: int, size: int) -> None:
    options = DistributedDataParallelKwargs(
        comm_hook="power_sgd", comm_state_option={"start_powerSGD_iter": 2, "warm_start": True}
    )

    def make() -> tuple[Accelerator, nn.Module, Any]:
        accelerator = Accelerator(cpu=True, project_dir=folder / "compressed", kwargs_handlers=[options])
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16))
        return accelerator, *accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), lr=0.1))

    def train(accelerator: Accelerator, model: nn.Module, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            accelerator.backward(model(inputs(rank, number)).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    whole_run, again = make(), make()
    train(*whole_run, range(5))
    whole_run[0].save_state()
    train(*whole_run, range(5, 8))
    again[0].resume()
    train(*again, range(5, 8))
    for went_on, resumed in zip(whole_run[1].parameters(), again[1].parameters(), strict=True):
        assert torch.equal(went_on, resumed)


def options_of_the_wrapper_are_torchs(folder: Path, rank: int, size: int) -> None:
    options = DistributedDataParallelKwargs(comm_hook="fp16", bucket_cap_mb=1, broadcast_buffers=False)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[options])
    model = accelerator.prepare(net())
    accelerator.backward(model(inputs(rank)).square().mean())
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], gradients_of_both(size, [0]), rtol=2e-2, atol=2e-3
    )
    traces = folder / "traces"
    with accelerator.profile(ProfileKwargs(activities=["cpu"], output_trace_dir=str(traces))) as profiler:
        model(inputs(rank))
    assert profiler.key_averages()
    assert json.loads((traces / f"profile_{rank}.json").read_text())["traceEvents"]


CHECKS: list[Callable[[Path, int, int], None]] = [
    a_model_is_wrapped_and_known,
    gradients_are_exchanged_at_the_end_of_a_window,
    a_backward_may_exchange_what_its_forward_did_not,
    schedulers_step_for_each_rank,
    what_cannot_work_is_refused_on_every_rank,
    shards_are_saved_by_their_owners,
    ranks_decide_together_when_to_save,
    buffers_of_each_rank_come_back,
    compressed_gradients_go_on,
    options_of_the_wrapper_are_torchs,
]


def run(argument: str, rank: int, size: int) -> None:
    for check in CHECKS:
        print(check.__name__, flush=True)
        check(Path(argument), rank, size)


def test_an_accelerator_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(__file__, "run", 2, tmp_path, timeout_s=150)
