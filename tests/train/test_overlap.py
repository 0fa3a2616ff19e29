"""Checkpoints that are copied while the next forward and backward run hold the state of their step."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.holding import Held

from keepstep.checkpoint.store import Store
from keepstep.errors import BackgroundSaveError
from keepstep.train.accelerator import Accelerator
from keepstep.train.settings.config import CheckpointPolicy

OVERLAPPED = CheckpointPolicy(every_n_steps=1, staging="overlapped")


class Net(torch.nn.Module):
    """With everything that changes between two optimizer steps: statistics, gradients, generators."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def make(path: Path, policy: CheckpointPolicy = OVERLAPPED, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    accelerator = Accelerator(project_dir=path, checkpoint_policy=policy, cpu=True, **options)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return accelerator, *accelerator.prepare(model, optimizer)


def train_step(accelerator: Accelerator, model: torch.nn.Module, optimizer: Any) -> None:
    loss = model(torch.randn(16, 8)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: torch.nn.Module, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.optimizer.state_dict()})


def assert_holds(path: Path, expected: dict[str, Any]) -> None:
    loaded = Store(path / "checkpoints").latest().load(["model/*", "optimizer/*"])  # type: ignore[union-attr]
    assert_same(dict(loaded["model"]), expected["model"])
    assert_same(loaded["optimizer"]["state"], expected["optimizer"]["state"])


def test_each_checkpoint_holds_its_own_step(tmp_path: Path) -> None:
    accelerator, model, optimizer = make(tmp_path)
    expected = []
    for _ in range(12):
        train_step(accelerator, model, optimizer)
        accelerator.checkpoint()
        expected.append(state_of(model, optimizer))
    accelerator.wait_for_checkpoint()
    checkpoints = Store(tmp_path / "checkpoints").list()
    assert [c.step for c in checkpoints] == list(range(1, 13))
    for checkpoint, state in zip(checkpoints, expected, strict=True):
        loaded = checkpoint.load()
        assert_same(dict(loaded["model"]), state["model"])
        assert_same(loaded["optimizer"]["state"], state["optimizer"]["state"])


def test_the_optimizer_waits_for_the_copy_and_nothing_else_does(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint()
    expected = state_of(model, optimizer)
    accelerator.backward(model(torch.randn(16, 8)).square().mean())  # batch statistics and gradients change
    held.holds_up(optimizer.step)
    accelerator.wait_for_checkpoint()
    assert_holds(tmp_path, expected)


@pytest.mark.parametrize("how", ["within", "of its own", "registered"])
def test_an_optimizer_that_was_not_prepared_waits_too(tmp_path: Path, held: Held, how: str) -> None:
    """A fused one writes without torch counting it: nothing would tell that the copy is torn."""
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    raw = {"within": optimizer.optimizer}.get(how) or torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    if how == "registered":
        raw = torch.optim.SGD([torch.ones(3, requires_grad=True)], lr=0.1, momentum=0.9, fused=True)
        accelerator.register_for_checkpointing(raw)
    for parameter in raw.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    held.opened.clear()
    accelerator.checkpoint()
    expected = state_of(model, optimizer)
    held.holds_up(raw.step)
    accelerator.wait_for_checkpoint()
    assert_holds(tmp_path, expected)


def test_an_optimizer_of_something_else_does_not_wait(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint()
    other = torch.ones(3, requires_grad=True)
    other.grad = torch.ones(3)
    torch.optim.SGD([other], lr=0.1).step()
    held.opened.set()
    accelerator.wait_for_checkpoint()


class Switching(torch.optim.SGD):
    """As schedule-free optimizers do: the weights for training and those for evaluation are two."""

    def eval(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.mul_(2)


def test_switching_to_evaluation_waits_for_the_copy(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = make(tmp_path)
    switching = accelerator.prepare(Switching(model.parameters(), lr=0.1))
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint()
    expected = state_of(model, optimizer)
    held.holds_up(switching.eval)
    accelerator.wait_for_checkpoint()
    assert_holds(tmp_path, expected)


def test_a_scheduler_may_change_a_learning_rate_that_is_a_tensor(tmp_path: Path, held: Held) -> None:
    accelerator, model, _ = make(tmp_path)
    inner = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5), foreach=False)
    optimizer, scheduler = accelerator.prepare(inner, torch.optim.lr_scheduler.StepLR(inner, 1, 0.1))
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint()
    scheduler.step()
    held.opened.set()
    accelerator.wait_for_checkpoint()
    assert accelerator.checkpoint_counts.redone == 0
    saved = Store(tmp_path / "checkpoints").latest().load("optimizer_1/*")  # type: ignore[union-attr]
    assert float(saved["optimizer_1"]["param_groups"][0]["lr"]) == 0.5


def test_gradients_that_count_may_be_cleared_at_once(tmp_path: Path, held: Held) -> None:
    """They are part of the checkpoint, and `zero_grad` does not wait for their copy."""
    accelerator, model, optimizer = make(tmp_path)
    accelerator.backward(model(torch.randn(16, 8)).square().mean())
    optimizer.step()
    accelerator.backward(model(torch.randn(16, 8)).square().mean())  # added to what was not cleared
    gradients = [p.grad.clone() for p in model.parameters()]
    held.opened.clear()
    assert accelerator.checkpoint() is not None
    optimizer.zero_grad(set_to_none=False)
    held.opened.set()
    accelerator.wait_for_checkpoint()
    saved = Store(tmp_path / "checkpoints").latest().load_per_rank()["gradients"]["of"]  # type: ignore[union-attr]
    assert_same(list(saved["optimizer"].values()), gradients)


class Graph(torch.nn.Module):
    """Its table has sparse gradients, its edges are a sparse buffer that is not part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 2, sparse=True)
        self.register_buffer("edges", torch.eye(5).to_sparse(), persistent=False)

    def forward(self, nodes: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.edges, torch.ones(5, 2))[nodes] + self.table(nodes)


def test_spent_sparse_gradients_and_sparse_buffers_keep_no_checkpoint_from_being_made(
    tmp_path: Path, held: Held
) -> None:
    accelerator, *_ = make(tmp_path)
    model = Graph()
    model, optimizer = accelerator.prepare(model, torch.optim.SparseAdam(model.parameters(), lr=0.1))
    for _ in range(2):  # at the second step it is known that this script clears what a step has used
        optimizer.zero_grad()
        accelerator.backward(model(torch.tensor([1, 3])).square().sum())
        optimizer.step()
    held.opened.clear()
    accelerator.checkpoint()
    expected = {"table.weight": model.table.weight.detach().clone()}
    held.holds_up(optimizer.step)
    accelerator.wait_for_checkpoint()
    saved = Store(tmp_path / "checkpoints").latest().load("model_1/*")  # type: ignore[union-attr]
    assert_same(dict(saved["model_1"]), expected)


def test_a_slip_is_named_and_the_checkpoint_made_again(
    tmp_path: Path, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint(metrics={"loss": 1.0})
    with torch.no_grad():
        model.layers[0].weight.add_(1)  # behind the optimizer's back
    held.opened.set()
    with caplog.at_level(logging.WARNING):
        accelerator.wait_for_checkpoint()
    assert "model/layers.0.weight" in caplog.text
    assert_holds(tmp_path, state_of(model, optimizer))
    (made,) = Store(tmp_path / "checkpoints").list()
    assert made.metrics == {"loss": 1.0}
    counts = accelerator.checkpoint_counts
    assert (counts.saved, counts.failed, counts.redone) == (1, 0, 1)
    held.opened.clear()
    train_step(accelerator, model, optimizer)
    held.opened.set()
    pending = accelerator.checkpoint()  # copied at once from now on
    assert pending is not None
    with torch.no_grad():
        before = state_of(model, optimizer)
        model.layers[0].weight.add_(1)
    accelerator.wait_for_checkpoint()
    assert_holds(tmp_path, before)


def test_a_slip_is_made_good_by_the_next_call_though_none_is_due(
    tmp_path: Path, held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator, model, optimizer = make(tmp_path, CheckpointPolicy(every_n_steps=100, staging="overlapped"))
    for _ in range(100):
        train_step(accelerator, model, optimizer)
        held.opened.clear() if accelerator.step == 100 else None
        pending = accelerator.checkpoint()
    accelerator.backward(model(torch.randn(16, 8)).square().mean())
    with torch.no_grad():
        model.layers[0].weight.add_(1)  # behind the optimizer's back
    held.opened.set()
    with contextlib.suppress(BackgroundSaveError):
        pending.wait()
    train_step(accelerator, model, optimizer)
    with caplog.at_level(logging.WARNING):
        assert accelerator.checkpoint() is not None
    expected = state_of(model, optimizer)
    accelerator.wait_for_checkpoint()
    assert "is made again" in caplog.text
    assert_holds(tmp_path, expected)
    assert [c.step for c in Store(tmp_path / "checkpoints").list()] == [101]
    counts = accelerator.checkpoint_counts
    assert (counts.saved, counts.failed, counts.redone) == (1, 0, 1)


def test_loading_waits_for_the_copy(tmp_path: Path) -> None:
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    accelerator.save_state(tmp_path / "mine")
    train_step(accelerator, model, optimizer)
    expected = state_of(model, optimizer)
    accelerator.checkpoint()
    accelerator.load_state(tmp_path / "mine")
    assert_holds(tmp_path, expected)


def test_a_copy_of_an_optimizer_waits_for_nothing(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint()
    twin = copy.deepcopy(optimizer)
    pickle.loads(pickle.dumps(optimizer))
    twin.step()
    held.opened.set()
    accelerator.wait_for_checkpoint()


def test_a_checkpoint_that_is_made_again_keeps_its_tags(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = make(tmp_path)
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint(tags="release")
    with torch.no_grad():
        model.layers[0].weight.add_(1)  # behind the optimizer's back
    held.opened.set()
    train_step(accelerator, model, optimizer)
    accelerator.checkpoint(tags=["second"])
    accelerator.wait_for_checkpoint()
    made = [(checkpoint.step, checkpoint.tags) for checkpoint in Store(tmp_path / "checkpoints").list()]
    assert made == [(2, ("release", "second"))]
