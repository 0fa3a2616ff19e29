"""torch.distributed.checkpoint saves to a bucket and loads from there, on many ranks and on one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from tests.buckets.server import Server
from tests.ranks.spawn import RankProcesses, run_ranks
from tests.ranks.training import build, same, state_of, train, whole
from torch.distributed.checkpoint.api import CheckpointException

import keepstep
from keepstep import Checkpoint, Store
from keepstep.checkpoint.place.claimant import this_process
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import UsageError


def save(said: dict[str, Any], name: str, state: Any, **how: Any) -> None:
    writer = keepstep.dcp.StorageWriter(f"{said['address']}/{name}", storage_options=said["options"], **how)
    torch_dcp.save(state, storage_writer=writer)


def load(said: dict[str, Any], name: str, state: Any) -> None:
    place, options = f"{said['address']}/{name}", said["options"]
    torch_dcp.load(state, storage_reader=keepstep.dcp.StorageReader(place, storage_options=options))


def opened(said: dict[str, Any], name: str) -> Checkpoint:
    return Checkpoint.open(f"{said['address']}/{name}", storage_options=said["options"])


# --------------------------------------------------------------------------------- all in one launch


def together(argument: str, rank: int, size: int) -> None:
    """Shards and large tensors, twice under names of the user's; a save that fails; values."""
    said = json.loads(argument)
    model, optimizer = build("fsdp", size)
    train(model, optimizer)
    base = {"w0": torch.ones(3 << 20), "w1": torch.ones(9)}  # one is uploaded in parts
    state = {**state_of(model, optimizer), "base": base, "note": "x"}
    expected = whole(state)
    for step in (1, 2):
        save(said, f"step_{step}", state, step=step)
    again = {
        **state_of(*build("fsdp", size, seed=3)),
        "base": {k: w * 0 for k, w in base.items()},
        "note": "",
    }
    train(model, optimizer)
    load(said, "step_2", again)
    same(whole(again), expected)
    with pytest.raises(CheckpointException, match="cannot save"):
        save(said, "step_3", {"base": base, f"only{rank}": object() if rank else 1})
    save(said, "step_3", {"base": base})
    if rank == 0:
        made = opened(said, "step_2")
        assert made.step == 2
        assert made.manifest.environment["world_size"] == size
        assert made.verify().sound
        (home,) = {str(entry.within) for entry in made.manifest.files.values()}
        assert home.startswith("attempt_")  # whole by itself
        assert made.load()["note"] == "x"
        assert torch.equal(opened(said, "step_3").load()["base"]["w1"], base["w1"])


def dying(argument: str, rank: int, size: int) -> None:
    """Killed in the middle of an upload, with a file there already."""

    def die(self: Objects, key: str, parts: Iterable[memoryview]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    Objects.upload = die  # type: ignore[method-assign]
    save(json.loads(argument), "cut_off", {"a": torch.ones(4), "b": {"w": torch.ones(3 << 20)}})


@pytest.mark.timeout(180)
def test_ranks_save_to_a_bucket_and_load_from_it(server: Server, address: str) -> None:
    said: dict[str, Any] = {"address": address, "options": server.options()}
    run_ranks(Path(__file__), "together", 2, json.dumps(said), timeout_s=120)
    with pytest.raises(CheckpointException, match="can't replace it in one step"):
        save(said, "step_2", {"n": 1})
    assert opened(said, "step_2").verify().sound
    (died,) = RankProcesses(Path(__file__), "dying", 1, json.dumps(said), alone_with_group=False).processes
    assert died.wait(60) == -signal.SIGKILL
    store = Store(address, storage_options=server.options())
    objects: Objects = store._backend._objects  # type: ignore[attr-defined]
    assert "cut_off/manifest.json" not in {found.key for found in objects.list("cut_off")}
    save(said, "cut_off", {"c": torch.ones(2)})
    assert opened(said, "cut_off").load()["c"].tolist() == [1, 1]
    assert not [found.key for found in objects.list("cut_off") if found.key.endswith("/b.safetensors")]
    save(said, "checkpoint_7", {"n": 7})  # under such a name a store knows it
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_7"]
    _what_is_somebody_elses_stays(said, objects)


def _what_is_somebody_elses_stays(said: dict[str, Any], objects: Objects) -> None:
    objects.put("datasets/train.bin", b"x")
    with pytest.raises(CheckpointException, match=r"not written by keepstep \(it holds train\.bin\)"):
        save(said, "datasets", {"n": 1})
    assert objects.get("datasets/train.bin") == b"x"
    with subprocess.Popen(["sleep", "60"]) as other:
        began = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        living = {**json.loads(this_process().dump()), "pid": other.pid, "started": int(began)}
        objects.put("busy/claim.json", json.dumps(living).encode())
        with pytest.raises(CheckpointException, match=f"is being written by process {other.pid} "):
            save(said, "busy", {"n": 1})
        other.kill()
    with pytest.raises(UsageError, match="a name of its own"):
        keepstep.dcp.StorageWriter("s3://tests")
    assert keepstep.dcp.StorageWriter.validate_checkpoint_id("s3://tests/x")
    assert not keepstep.dcp.StorageReader.validate_checkpoint_id("s3://tests")
