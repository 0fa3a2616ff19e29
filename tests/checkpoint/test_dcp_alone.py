"""`dcp.save` of one process: a writer that travels, saves within saves, addresses."""

from __future__ import annotations

import os
import signal
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from tests.checkpoint.equality import assert_same
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import keepstep
from keepstep import Checkpoint
from keepstep.errors import UsageError
from keepstep.files import LocalFiles


def save(writer: keepstep.dcp.StorageWriter, value: float) -> None:
    torch_dcp.save({"a": {"w": torch.full((9,), value)}}, storage_writer=writer, no_dist=True)


def value(path: Path) -> float:
    made = Checkpoint.open(path)
    assert made.verify().sound
    return float(made.load()["a"]["w"][0])


def test_a_writer_that_has_saved_can_be_sent_to_another_process(tmp_path: Path) -> None:
    writer = keepstep.dcp.StorageWriter(tmp_path / "here")
    save(writer, 1.0)
    sent = ForkingPickler.loads(ForkingPickler.dumps(writer))
    sent.reset(tmp_path / "there")
    save(sent, 2.0)
    save(writer, 3.0)
    assert (value(tmp_path / "here"), value(tmp_path / "there")) == (3.0, 2.0)


@pytest.mark.parametrize("own", [False, True], ids=["a writer of its own", "the same writer"])
@pytest.mark.parametrize("at", ["segment", "state.json"])
def test_a_handler_that_saves_within_a_save_is_refused_and_the_outer_one_ends(
    tmp_path: Path, own: bool, at: str
) -> None:
    class Interrupted(LocalFiles):
        """A signal comes when the first file is made."""

        def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True):  # type: ignore[no-untyped-def]
            if at == "segment":
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().create_segment(path, size_bytes, durable=durable)

        def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
            if path.name == at:
                os.kill(os.getpid(), signal.SIGUSR1)
            super().write_file(path, data, durable=durable)

    refused = []
    outer = keepstep.dcp.StorageWriter(tmp_path / "outer", files=Interrupted())

    def handler(number: int, frame: FrameType | None) -> None:
        writer = outer if own else keepstep.dcp.StorageWriter(tmp_path / "inner")
        try:
            save(writer, 2.0)
        except BaseException as error:  # noqa: BLE001  (DCP's own is one)
            refused.append(str(error))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        save(outer, 1.0)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused
    assert all("by the handler of a signal" in said for said in refused)
    assert value(tmp_path / "outer") == 1.0
    assert [found.name for found in tmp_path.iterdir()] == ["outer"]
    save(keepstep.dcp.StorageWriter(tmp_path / "inner"), 3.0)
    assert value(tmp_path / "inner") == 3.0


def test_an_address_of_another_kind_is_no_place_for_a_checkpoint(tmp_path: Path) -> None:
    for kind in (keepstep.dcp.StorageWriter, keepstep.dcp.StorageReader):
        assert kind.validate_checkpoint_id(tmp_path)
        assert kind.validate_checkpoint_id("gs://bucket/run/step_1")
        assert not kind.validate_checkpoint_id("hdfs://x/y")
    with pytest.raises(UsageError, match="hdfs:// is no kind of bucket"):
        keepstep.dcp.StorageWriter("hdfs://x/y")


def taken_steps(count: int) -> dict[str, Any]:
    """A state with values that are no tensors below keys that are no text; DCP knows the keys as text."""
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(table.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        table(torch.tensor([1, 3])).square().sum().backward()
        optimizer.step()
    return {
        "optimizer": optimizer.state_dict(),
        "shards": {0: {"offset": count}, "0": {"name": f"s{count}"}},
        "losses": {0: count / 2, None: "none", True: [count]},
        "listed": [{"a": count}, {7: {8: count}}],
    }


def by_text(node: Any) -> Any:
    """Mappings by the text of their keys, as DCP takes them; of two alike the later, which torch adds."""
    if isinstance(node, list):
        return [by_text(child) for child in node]
    if not isinstance(node, dict):
        return node
    merged: dict[str, Any] = {}
    for key, child in node.items():
        child, before = by_text(child), merged.get(str(key))
        merged[str(key)] = {**before, **child} if isinstance(before, dict) else child
    return merged


def test_values_below_keys_that_are_no_text_are_loaded_as_by_torch(tmp_path: Path) -> None:
    saved, live, theirs = taken_steps(3), taken_steps(1), taken_steps(1)
    assert saved["optimizer"]["state"][0]["step"] == 3
    torch_dcp.save(saved, checkpoint_id=tmp_path / "torch", no_dist=True)
    torch_dcp.load(theirs, checkpoint_id=tmp_path / "torch", no_dist=True)
    torch_dcp.save(saved, storage_writer=keepstep.dcp.StorageWriter(tmp_path / "here"), no_dist=True)
    torch_dcp.load(live, storage_reader=keepstep.dcp.StorageReader(tmp_path / "here"), no_dist=True)
    assert_same(live, saved)
    assert_same(by_text(live), by_text(theirs))


class Renaming(DefaultLoadPlanner):
    """Loads what is saved under another name, and does not say where it belongs."""

    def set_up_planner(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().set_up_planner({"a": state_dict["b"]}, *args, **kwargs)
        self.original_state_dict = state_dict


def test_a_value_that_has_no_place_is_told_before_anything_is_overwritten(tmp_path: Path) -> None:
    writer = keepstep.dcp.StorageWriter(tmp_path / "c")
    torch_dcp.save({"a": {"w": torch.ones(3), "n": 1}}, storage_writer=writer, no_dist=True)
    live = {"b": {"w": torch.zeros(3), "n": 0}}
    reader = keepstep.dcp.StorageReader(tmp_path / "c")
    with pytest.raises(CheckpointException, match=r"Renaming asks for 'a\.n'"):
        torch_dcp.load(live, storage_reader=reader, planner=Renaming(), no_dist=True)
    assert_same(live, {"b": {"w": torch.zeros(3), "n": 0}})
