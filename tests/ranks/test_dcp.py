"""keepstep checkpoints through torch.distributed.checkpoint: any number of ranks, any sharding."""

from __future__ import annotations

import datetime as dt
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from tests.ranks.spawn import run_ranks
from tests.ranks.training import build, give_back, same, state_of, train, whole
from torch.distributed.checkpoint.api import CheckpointException

import keepstep
from keepstep import Checkpoint, Store
from keepstep.errors import DirectoryNotOursError, UsageError

KINDS = {1: ["plain"], 2: ["plain", "fsdp", "tp"], 4: ["fsdp", "tp"]}
EXTRA = {
    "when": dt.date(2026, 1, 2), "pair": (1, torch.arange(3)), "empty": [], "names": ["a", "b"],
    "deep": [{"x": torch.ones(2)}, {"x": 3}], "$odd": float("inf"),
}  # fmt: skip


def writing(root: str, rank: int, size: int) -> None:
    """Each kind of sharding saved, with the values as they are written down beside it by rank 0."""
    for kind in KINDS[size]:
        model, optimizer = build(kind, size)
        train(model, optimizer)
        state = state_of(model, optimizer)
        path = Path(root) / f"{kind}-{size}"
        writer = keepstep.dcp.StorageWriter(path, step=2, metrics={"loss": 0.5})
        torch_dcp.save({**state, "extra": dict(EXTRA)}, storage_writer=writer)
        values = whole(state)
        if rank == 0:
            Store(Path(root) / f"values-{kind}-{size}").save(values)
            assert keepstep.Checkpoint.open(path).verify().sound
    if size == 2:
        _async(root)
        _a_rank_that_fails(root, rank)


def writing_and_reading(root: str, rank: int, size: int) -> None:
    writing(root, rank, size)
    reading(root, rank, size)


def _async(root: str) -> None:
    model, optimizer = build("fsdp", 2)
    train(model, optimizer)
    before = whole(state_of(model, optimizer))
    writer = keepstep.dcp.StorageWriter(Path(root) / "async")
    group = dist.new_group()  # the training goes on using the default one
    future = torch_dcp.async_save(state_of(model, optimizer), storage_writer=writer, process_group=group)
    train(model, optimizer)
    future.result()
    again = state_of(model, optimizer)
    torch_dcp.load(again, storage_reader=keepstep.dcp.StorageReader(Path(root) / "async"))
    same(whole(again), before)


def _a_rank_that_fails(root: str, rank: int) -> None:
    path = Path(root) / "failing"
    writer = keepstep.dcp.StorageWriter(path)
    bad = {"a": torch.ones(2), "b": object() if rank == 1 else 1, f"only{rank}": object() if rank else 1}
    with pytest.raises(CheckpointException, match="cannot save"):
        torch_dcp.save(bad, storage_writer=writer)
    torch_dcp.save({"a": torch.ones(2)}, storage_writer=writer)  # the next one is none the worse
    if rank == 0:
        assert sorted(p.name for p in path.parent.glob("failing*")) == ["failing"]


def reading(root: str, rank: int, size: int) -> None:
    """Everything that any number of ranks saved, into every kind of sharding of this number."""
    for saved in sorted(Path(root).glob("*-[124]")):
        if saved.name.startswith("values-"):
            continue
        expected = Checkpoint.open(Path(root) / f"values-{saved.name}" / "checkpoint_0").load()
        for kind in KINDS[size]:
            model, optimizer = build(kind, size, seed=1)
            state: dict[str, Any] = {**state_of(model, optimizer), "extra": dict.fromkeys(EXTRA)}
            state["extra"]["deep"] = [{"x": torch.zeros(2)}, {"x": 0}]
            torch_dcp.load(state, storage_reader=keepstep.dcp.StorageReader(saved))
            extra = state.pop("extra")
            assert extra.pop("pair")[1].tolist() == [0, 1, 2]
            assert extra == {
                **{k: v for k, v in EXTRA.items() if k not in ("pair", "deep")},
                "deep": extra["deep"],
            }
            assert extra["deep"][0]["x"].tolist() == [1, 1]
            assert extra["deep"][1]["x"] == 3
            same(whole(state), expected)
            give_back(model, optimizer, state)
            same(whole(state_of(model, optimizer)), expected)
        values = Path(root) / f"values-{saved.name}" / "checkpoint_0"
        torch_dcp.load(state, storage_reader=keepstep.dcp.StorageReader(values))  # what Store.save wrote
        same(whole(state), expected)
        if rank == size - 1:
            same({k: Checkpoint.open(saved).load()[k] for k in ("model", "optimizer")}, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by 1, 2 and 4 ranks; the four have read it all back."""
    root = tmp_path_factory.mktemp("dcp")
    writing(str(root), 0, 1)
    run_ranks(Path(__file__), "writing", 2, root)
    run_ranks(Path(__file__), "writing_and_reading", 4, root, timeout_s=150)
    return root


@pytest.mark.timeout(400)
def test_every_sharding_is_read_into_every_other(saved: Path) -> None:
    run_ranks(Path(__file__), "reading", 2, saved, timeout_s=150)
    reading(str(saved), 0, 1)


def test_each_rank_wrote_its_share_in_plain_files(saved: Path) -> None:
    checkpoint = Checkpoint.open(saved / "fsdp-4")
    assert checkpoint.manifest.environment["world_size"] == 4
    assert (checkpoint.step, checkpoint.metrics) == (2, {"loss": 0.5})
    names = sorted(checkpoint.manifest.files)
    assert [n for n in names if n.startswith("model-")] == [f"model-{n}-of-00004.safetensors" for n in
                                                            ("00001", "00002", "00003", "00004")]  # fmt: skip
    up = checkpoint.tensors["model/0.up.weight"]
    assert [(chunk.at, chunk.shape) for chunk in up.chunks] == [((6 * n, 0), (6, 10)) for n in range(4)]
    assert b"pickle" not in b"".join(path.read_bytes() for path in (saved / "fsdp-4").iterdir())


def test_one_process_needs_no_group(tmp_path: Path) -> None:
    state = {
        "w": torch.arange(6.0).reshape(2, 3),
        "n": 3,
        "empty": torch.empty(0, 2),
        "nested": OrderedDict(a=1),
    }
    torch_dcp.save(dict(state), storage_writer=keepstep.dcp.StorageWriter(tmp_path / "c"), no_dist=True)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["manifest.json", "state.json", "state.safetensors"]
    target: dict[str, Any] = {
        "w": torch.zeros(2, 3, dtype=torch.float64), "n": 0, "empty": torch.empty(0, 2), "nested": {"a": 0}
    }  # fmt: skip
    torch_dcp.load(
        target, checkpoint_id=tmp_path / "c", storage_reader=keepstep.dcp.StorageReader("."), no_dist=True
    )
    assert target["w"].tolist() == state["w"].tolist()
    assert (target["n"], target["nested"]) == (3, {"a": 1})
    Checkpoint.open(tmp_path / "c").load_into(
        {"w": torch.zeros(2, 3), "n": 0, "empty": torch.empty(0, 2), "nested": {"a": 2}}
    )


def test_damage_is_found_by_dcp_load(tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0)}
    torch_dcp.save(state, storage_writer=keepstep.dcp.StorageWriter(tmp_path / "c"), no_dist=True)
    path = tmp_path / "c" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointException, match="was changed or the disk is failing"):
        torch_dcp.load(state, storage_reader=keepstep.dcp.StorageReader(tmp_path / "c"), no_dist=True)


def test_what_can_not_work_is_refused_in_words(tmp_path: Path) -> None:
    class Pickles(torch_dcp.DefaultSavePlanner):
        def resolve_data(self, item: Any) -> Any:
            return super().resolve_data(item)

    class Unpickles(torch_dcp.DefaultLoadPlanner):
        def load_bytes(self, item: Any, value: Any) -> None:
            super().load_bytes(item, value)

    writer, good = keepstep.dcp.StorageWriter(tmp_path / "c"), keepstep.dcp.StorageWriter(tmp_path / "good")
    with pytest.raises(CheckpointException, match="never as pickled bytes"):
        torch_dcp.save({"n": 1}, storage_writer=writer, planner=Pickles(), no_dist=True)
    torch_dcp.save({"w": torch.ones(2)}, storage_writer=writer, planner=Pickles(), no_dist=True)
    torch_dcp.save({"n": 1}, storage_writer=good, no_dist=True)
    with pytest.raises(CheckpointException, match="never as pickled bytes"):
        torch_dcp.load({"n": 1}, storage_reader=keepstep.dcp.StorageReader(tmp_path / "good"),
                       planner=Unpickles(), no_dist=True)  # fmt: skip
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointException, match=r"thesis\.tex"):
        torch_dcp.save({"n": 1}, storage_writer=keepstep.dcp.StorageWriter(tmp_path / "other"), no_dist=True)
    cached = torch_dcp.DefaultSavePlanner(enable_plan_caching=True)
    torch_dcp.save({"n": 1}, storage_writer=writer, planner=cached, no_dist=True)
    with pytest.raises(CheckpointException, match="enable_plan_caching"):
        torch_dcp.save({"n": 1}, storage_writer=writer, planner=cached, no_dist=True)
    assert issubclass(DirectoryNotOursError, OSError)
    with pytest.raises(UsageError, match="use_collectives"):
        keepstep.dcp.StorageWriter(tmp_path / "d").set_up_storage_writer(True, use_collectives=False)
