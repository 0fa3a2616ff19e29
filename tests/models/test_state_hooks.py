"""Hooks before saving and restoring: files of a script's own, models that it sees to itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import keepstep
from keepstep.errors import MismatchError, UsageError


def run(directory: Path | None, seed: int) -> tuple[Any, nn.Module, nn.Module, Any]:
    torch.manual_seed(seed)
    accelerator = keepstep.Accelerator(cpu=True, project_dir=directory)
    first, second = nn.Linear(2, 2), nn.Linear(3, 3)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], 0.1)
    return accelerator, *accelerator.prepare(first, second, optimizer)


def save_config(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
    (Path(output_dir) / "config.json").write_text(json.dumps({"models": len(models)}))
    (Path(output_dir) / "empty").write_bytes(b"")


def step(optimizer: Any, *models: nn.Module) -> None:
    for model in models:
        model(torch.ones(1, model.in_features)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("by_hand", [True, False])
def test_files_of_hooks_are_part_of_the_checkpoint(tmp_path: Path, by_hand: bool) -> None:
    accelerator, first, second, optimizer = run(tmp_path / "project", 0)
    accelerator.register_save_state_pre_hook(save_config)
    step(optimizer, first, second)
    place = accelerator.save_state(tmp_path / "mine" if by_hand else None)
    assert keepstep.Checkpoint.open(place).verify().sound
    assert sorted(keepstep.Checkpoint.open(place).load("files")["files"]) == ["config.json", "empty"]

    other, third, _, _ = run(tmp_path / "project", 1)
    read: list[Any] = []

    def load_config(models: list[nn.Module], input_dir: str) -> None:
        read.append(json.loads((Path(input_dir) / "config.json").read_text()))
        assert (Path(input_dir) / "empty").read_bytes() == b""
        assert not torch.equal(third.weight, first.weight)  # it comes before

    other.register_load_state_pre_hook(load_config)
    if by_hand:
        other.load_state(place)
    else:
        assert other.resume() is not None
    assert read == [{"models": 2}]
    assert torch.equal(third.weight, first.weight)
    without, fourth, _, _ = run(tmp_path / "project", 2)
    without.load_state(place)  # a script without hooks ignores the files
    assert torch.equal(fourth.weight, first.weight)
    assert not list(tmp_path.rglob(".keepstep-hooks-*"))


def test_a_hook_can_see_to_a_model_itself(tmp_path: Path) -> None:
    accelerator, first, second, optimizer = run(tmp_path, 0)
    step(optimizer, first, second)

    def save_first(models: list[nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        keepstep.models.export.export_weights(weights.pop(0), Path(output_dir) / "first")

    def load_first(models: list[nn.Module], input_dir: str) -> None:
        keepstep.load_checkpoint_in_model(models.pop(0), Path(input_dir) / "first", strict=True)

    accelerator.register_save_state_pre_hook(save_first)
    place = accelerator.save_state()
    assert set(keepstep.Checkpoint.open(place).load()) == {"files", "model_1", "optimizer", "train"}
    other, third, fourth, _ = run(tmp_path, 1)
    with pytest.raises(MismatchError, match="model"):
        other.load_state(place)
    handle = other.register_load_state_pre_hook(load_first)
    other.load_state(place)
    assert torch.equal(third.weight, first.weight)
    assert torch.equal(fourth.weight, second.weight)
    handle.remove()
    with pytest.raises(MismatchError, match="model"):
        other.load_state(place)


def test_a_removed_hook_is_not_called(tmp_path: Path) -> None:
    accelerator, first, second, optimizer = run(tmp_path, 0)
    accelerator.register_save_state_pre_hook(save_config).remove()
    step(optimizer, first, second)
    assert "files" not in keepstep.Checkpoint.open(accelerator.save_state()).load()


def test_a_hook_that_raises_or_makes_up_weights_saves_nothing(tmp_path: Path) -> None:
    accelerator, first, second, optimizer = run(tmp_path, 0)
    step(optimizer, first, second)

    def failing(*_: Any) -> None:
        raise ZeroDivisionError

    handle = accelerator.register_save_state_pre_hook(failing)
    with pytest.raises(ZeroDivisionError):
        accelerator.save_state(tmp_path / "out")
    handle.remove()
    accelerator.register_save_state_pre_hook(lambda models, weights, output_dir: weights.append({}))
    with pytest.raises(UsageError, match="weights of its own"):
        accelerator.save_state(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_is_saved_to_again_and_files_of_others_stay(tmp_path: Path) -> None:
    accelerator, first, second, optimizer = run(None, 0)
    (tmp_path / "out").mkdir()
    for _ in range(2):
        step(optimizer, first, second)
        accelerator.save_state(tmp_path / "out")
        (tmp_path / "out" / "notes.txt").write_text("mine")
    accelerator.save_state(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    other, third, _, _ = run(None, 1)
    other.load_state(tmp_path / "out")
    assert torch.equal(third.weight, first.weight)
