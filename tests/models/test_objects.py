"""`Accelerator.save` and `keepstep.load`: any tree as one plain file."""

from __future__ import annotations

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from tests.checkpoint.equality import assert_same
from tests.checkpoint.faults import FaultyFiles, Killed
from tests.models.networks import network
from torch import nn

import keepstep
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    UnsupportedTypeError,
    UsageError,
)
from keepstep.models.objects import save_object

TREES: list[Any] = [
    [0, 1, 2, 3],
    {},
    [],
    None,
    "text",
    torch.arange(3),
    {"epoch": 3, "losses": [0.1, float("nan"), float("inf")], "best": (1, 2), 7: "seven"},
    {"weights": {"a": torch.ones(2, 3, dtype=torch.bfloat16)}, "array": np.arange(4.0), "name": "run"},
    collections.OrderedDict(a=torch.zeros(1), step=4),
]


@pytest.mark.parametrize("tree", TREES, ids=repr)
def test_what_is_saved_comes_back(tree: Any, tmp_path: Path) -> None:
    save_object(tree, tmp_path / "array.pkl")
    assert_same(keepstep.load(tmp_path / "array.pkl"), tree)
    assert [path.name for path in tmp_path.iterdir()] == ["array.pkl"]


@pytest.mark.parametrize("insist", [False, True])
def test_a_state_dict_is_a_file_that_others_read(tmp_path: Path, insist: bool) -> None:
    model, other = network(1), network(2)
    save_object(model.state_dict(), tmp_path / "model.pt", insist)
    assert set(load_file(tmp_path / "model.pt")) == set(model.state_dict()) - {"head.weight"}
    other.load_state_dict(keepstep.load(tmp_path / "model.pt"))
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())


def test_an_object_with_a_state_dict_comes_back_as_that(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_object({"optimizer": optimizer, "model": model}, tmp_path / "both")
    loaded = keepstep.load(tmp_path / "both", map_location="cpu")
    assert_same(loaded["optimizer"], optimizer.state_dict())
    optimizer.load_state_dict(loaded["optimizer"])


def test_tensors_that_share_memory_keep_their_values(tmp_path: Path) -> None:
    memory = torch.arange(6.0)
    tree = [memory, memory, memory[2:4], {"t": memory.reshape(2, 3).T}]
    save_object(tree, tmp_path / "f")
    loaded = keepstep.load(tmp_path / "f")
    assert_same(loaded, tree)
    assert loaded[0] is loaded[1]


def test_an_open_file_is_written_to() -> None:
    file = io.BytesIO()
    save_object({"a": torch.ones(2)}, file)
    assert torch.equal(load_bytes(file.getvalue())["a"], torch.ones(2))


def test_a_kill_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for at in range(20):
        save_object(["old"], path)
        assert [file.name for file in tmp_path.iterdir()] == ["f"]  # what a killed one left is gone
        files = FaultyFiles(at=at, power_cut=True)
        try:
            save_object(["new"], path, files=files)
        except Killed:
            assert keepstep.load(path) in (["old"], ["new"])
        else:
            break
    assert keepstep.load(path) == ["new"]
    assert at > 2


def test_what_cannot_be_kept_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTypeError, match="function"):
        save_object({"f": lambda: 1}, tmp_path / "f")
    with pytest.raises(UsageError, match="got a list"):
        save_object([1], tmp_path / "f", safe_serialization=True)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(pickle.dumps([1, 2, 3]))
    with pytest.raises(DamagedCheckpointError, match=r"If this is a pickle"):
        keepstep.load(tmp_path / "p")
    with pytest.raises(CheckpointNotFoundError, match="there is no file"):
        keepstep.load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="unpickle"):
        keepstep.load(tmp_path / "p", weights_only=False)
    save_object([torch.ones(2)], tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(data.replace(b"$tensor", b"$tansor"))
    with pytest.raises(DamagedCheckpointError, match="tree can't be read"):
        keepstep.load(tmp_path / "f")
