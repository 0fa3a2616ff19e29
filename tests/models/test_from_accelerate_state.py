"""Checkpoints that Accelerate itself wrote, restored by `load_state`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.forked import run_program

import keepstep
from keepstep.errors import DamagedCheckpointError, ForeignTypeError, MismatchError, RestoreError, UsageError
from keepstep.utils import DataLoaderConfiguration

STEPS = 3

SCRIPT = """
import random, sys
import numpy as np
import torch
from torch import nn

class Counter:
    def __init__(self):
        self.n, self.array = 0, np.zeros(2)
    def state_dict(self):
        return {"n": self.n, "array": self.array, "tensor": torch.tensor([self.n])}
    def load_state_dict(self, state):
        self.n, self.array = state["n"], state["array"]

def build(accelerator):
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    second = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *second.parameters()], lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    counter = Counter()
    prepared = accelerator.prepare(model, second, optimizer, scheduler)
    accelerator.register_for_checkpointing(counter)
    return *prepared, counter

def train(accelerator, parts, steps):
    model, second, optimizer, scheduler, counter = parts
    for _ in range(steps):
        loss = second(model(torch.randn(6, 4) + random.random() + np.random.rand())).square().mean()
        accelerator.backward(loss)
        optimizer.step(); scheduler.step(); optimizer.zero_grad()
        counter.n += 1; counter.array += 0.5

def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item(), float(np.random.randn())

def values(parts):
    model, second, optimizer, scheduler, counter = parts
    tensors = [*model.state_dict().values(), *second.state_dict().values()]
    return [tensor.clone() for tensor in tensors], scheduler.get_last_lr(), counter.n, counter.array.tolist()
"""

THEIRS = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
parts = build(accelerator)
train(accelerator, parts, STEPS)
accelerator.save_state(sys.argv[1] + "/safe")
accelerator.save_state(sys.argv[1] + "/torch", safe_serialization=False)
train(accelerator, parts, STEPS)
torch.save(values(parts), sys.argv[1] + "/expected")
accelerator.load_state(sys.argv[1] + "/safe")
torch.save(draws(), sys.argv[1] + "/draws")
"""

names: dict[str, Any] = {"__name__": "script"}
exec(SCRIPT, names)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Accelerate wrote after three steps, and the values that it ended with after six."""
    directory = tmp_path_factory.mktemp("theirs")
    code = SCRIPT + THEIRS.replace("STEPS", str(STEPS))
    done = run_program(code, directory)
    assert done.returncode == 0, done.stdout
    return directory


def assert_values(first: Any, second: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert first[1:] == second[1:]


@pytest.mark.parametrize("kind", ["safe", "torch"])
def test_a_run_goes_on_as_it_would_have_under_accelerate(
    saved: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = keepstep.Accelerator(cpu=True)
    parts = names["build"](accelerator)
    with caplog.at_level(logging.WARNING):
        assert accelerator.load_state(saved / kind) is None
    assert "keeps no place in the data" in caplog.text
    assert accelerator.step == STEPS
    names["train"](accelerator, parts, STEPS)
    expected = torch.load(saved / "expected", weights_only=False)
    assert_values(names["values"](parts), expected)


def test_the_last_of_a_project_is_found(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A script that numbered its checkpoints under Accelerate goes on with them, and none of them goes."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(saved / "safe", checkpoints / "checkpoint_2")
    shutil.copytree(saved / "torch", checkpoints / "checkpoint_10")
    project = keepstep.ProjectConfiguration(
        project_dir=tmp_path, automatic_checkpoint_naming=True, total_limit=1
    )
    accelerator = keepstep.Accelerator(cpu=True, project_config=project)
    parts = names["build"](accelerator)
    with caplog.at_level(logging.WARNING):
        assert accelerator.resume() is None
        assert f"begins anew beside {checkpoints / 'checkpoint_10'}" in caplog.text
        assert accelerator.load_state() is None
    assert accelerator.step == STEPS
    names["train"](accelerator, parts, STEPS)
    assert_values(names["values"](parts), torch.load(saved / "expected", weights_only=False))
    assert [Path(accelerator.save_state()).name for _ in range(2)] == ["checkpoint_11", "checkpoint_12"]
    left = sorted(path.name for path in checkpoints.glob("checkpoint_*"))
    assert left == ["checkpoint_10", "checkpoint_12", "checkpoint_2"]
    assert accelerator.load_state() is not None


def test_what_does_not_fit_is_all_named_and_nothing_is_changed(saved: Path) -> None:
    accelerator = keepstep.Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        accelerator.load_state(saved / "safe")
    told = "\n".join(caught.value.different)
    for text in (
        "2 models were saved, and 1 are here",
        "1 schedulers were saved, and 0 are here",
        "1 objects registered for checkpointing were saved, and 0 are here",
        "model 0: 0.weight: the shape is [8, 4] in the checkpoint and [8, 3] here",
        "model 0: 3.weight is in the checkpoint, and not in the model",
        "optimizer 0: its groups had [8] parameters, and have [4] now",
    ):
        assert text in told
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_an_object_that_refuses_leaves_everything_as_it_was(saved: Path) -> None:
    accelerator = keepstep.Accelerator(cpu=True)
    parts = names["build"](accelerator)
    names["train"](accelerator, parts, 1)
    before = names["values"](parts)

    class Refusing(names["Counter"]):  # type: ignore[misc]
        def load_state_dict(self, state: Any) -> None:
            if state["n"] == STEPS:
                raise LookupError("not this one")

    accelerator._state.registered[0] = Refusing()
    with pytest.raises(RestoreError, match="not this one"):
        accelerator.load_state(saved / "safe")
    assert_values(names["values"](parts), before)


def test_nothing_in_the_files_is_executed(saved: Path, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(saved / "safe", directory)

    class Evil:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('executed')",)

    torch.save({"n": Evil()}, directory / "custom_checkpoint_0.pkl")
    accelerator = keepstep.Accelerator(cpu=True)
    names["build"](accelerator)
    with pytest.raises(ForeignTypeError, match=r"custom_checkpoint_0\.pkl"):
        accelerator.load_state(directory)
    (directory / "optimizer.bin").write_bytes(b"PK\3\4")
    with pytest.raises(DamagedCheckpointError, match=r"optimizer\.bin"):
        accelerator.load_state(directory)
    (directory / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(UsageError, match="holds weights in shards"):
        accelerator.load_state(directory)


def test_generators_go_on_where_they_were(saved: Path) -> None:
    accelerator = keepstep.Accelerator(cpu=True)
    names["build"](accelerator)
    accelerator.load_state(saved / "safe")
    assert names["draws"]() == torch.load(saved / "draws", weights_only=False)


def test_what_accelerate_keeps_of_loaders_is_named(tmp_path: Path, saved: Path, caplog: Any) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(saved / "safe", directory)
    (directory / "dl_state_dict.bin").write_bytes(b"")
    accelerator = keepstep.Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    names["build"](accelerator)
    with caplog.at_level(logging.WARNING):
        accelerator.load_state(directory)
    assert "dl_state_dict.bin not read" in caplog.text
