"""Many ranks save and load through one store: each its share, all or nothing, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.spawn import RankProcesses, run_ranks
from tests.ranks.training import build, same, train, whole

from keepstep import Checkpoint, Store
from keepstep.errors import (
    NoValidCheckpointError,
    RankError,
    RankFailedError,
    RankMissingError,
    RanksDifferError,
    UsageError,
)
from keepstep.files import LocalFiles, SegmentFile
from keepstep.world import Ranks

MIB = 1 << 20


def replicated() -> dict[str, Any]:
    torch.manual_seed(5)
    return {
        "model": {f"w{n}": torch.randn(MIB) for n in range(16)},  # 4 MiB each
        "small": {"a": torch.arange(4), "alias": torch.arange(4)},
        "step": 7,
    }


def together(root: str, rank: int, size: int) -> None:
    """Many checks in one start of the processes, since each start costs seconds."""
    world = Ranks(timeout_s=30)
    store = Store(Path(root) / f"replicated-{size}", world=world)
    own = {"rank": rank, "rng": torch.full((3,), rank)}
    for step in range(3):
        checkpoint = store.save(replicated(), step=step, per_rank=own)
        assert checkpoint.step == step
    pending = store.save_in_background(replicated(), step=3, per_rank=own)
    assert pending.wait().name == "checkpoint_3"
    _each_wrote_its_share(checkpoint, size)
    _sharded(Path(root), world)
    _what_differs_is_named(store, world)
    _a_rank_that_raises(store, world)
    _damage_seen_by_one(Path(root), world)
    assert store.save(replicated(), step=9).name == "checkpoint_4"
    dist.barrier()
    assert not list(Path(root).rglob("*.tmp-*"))


def _each_wrote_its_share(checkpoint: Checkpoint, size: int) -> None:
    entries = checkpoint.tensors
    by_file: dict[str, int] = {}
    for address, entry in entries.items():
        if address.startswith("model/"):
            by_file[str(entry.file)] = by_file.get(str(entry.file), 0) + entry.bytes
    assert len(by_file) == size
    assert max(by_file.values()) == min(by_file.values())  # 16 tensors of one size
    assert sorted(by_file) == [f"model-{n:05d}-of-{size:05d}.safetensors" for n in range(1, size + 1)]
    assert "model.safetensors.index.json" in checkpoint.manifest.files
    assert checkpoint.manifest.environment["world_size"] == size
    for rank in range(size):
        assert checkpoint.load_per_rank(rank)["rng"].tolist() == [rank] * 3
    assert checkpoint.load_per_rank(size) is None


def _sharded(root: Path, world: Ranks) -> None:
    for kind in ("fsdp", "tp"):
        model, optimizer = build(kind, world.size)
        train(model, optimizer)
        store = Store(root / f"{kind}-{world.size}", world=world)
        store.save({"model": model, "optimizer": optimizer}, step=2)
        before = whole(model.state_dict()), whole(optimizer.state_dict()["state"])
        model, optimizer = build(kind, world.size, seed=3)  # an optimizer that has taken no step
        assert store.load_latest_into({"model": model, "optimizer": optimizer}) is not None
        same((whole(model.state_dict()), whole(optimizer.state_dict()["state"]))[0], before[0])
        same(whole(optimizer.state_dict()["state"]), before[1])
        train(model, optimizer)  # and it goes on
        assert store.load_latest_into({"model": model, "optimizer": optimizer}) is not None
        same(whole(model.state_dict()), before[0])
        same(whole(optimizer.state_dict()["state"]), before[1])


def _what_differs_is_named(store: Store, world: Ranks) -> None:
    state = replicated()
    if world.rank == world.size - 1:
        state["model"]["w3"] = state["model"]["w3"].double()
        state["model"]["extra"] = torch.ones(2)
    with pytest.raises((RanksDifferError, RankFailedError), match=f"rank {world.size - 1}: .*extra.*float64"):
        store.save(state)
    with pytest.raises((RanksDifferError, RankFailedError), match="must save together"):
        store.save(replicated(), step=1 if world.rank else 2)


def _a_rank_that_raises(store: Store, world: Ranks) -> None:
    state: dict[str, Any] = replicated()
    state["bad"] = object() if world.rank == world.size - 1 else 3
    began = time.monotonic()
    with pytest.raises(Exception, match="cannot save 'bad'") as caught:
        store.save(state)
    assert time.monotonic() - began < 15
    if world.rank != world.size - 1:
        assert isinstance(caught.value, RankFailedError)
        assert caught.value.rank == world.size - 1
    world.barrier()


def _damage_seen_by_one(root: Path, world: Ranks) -> None:
    """Only the last rank reads its own part, and that is the part that is damaged."""
    store = Store(root / f"damaged-{world.size}", world=world)
    for step in range(2):
        store.save({"n": step}, step=step, per_rank={"x": torch.full((4,), step + world.rank)})
    if world.rank == 0:
        victim = store.path / "checkpoint_1" / f"rank-{world.size - 1:05d}.safetensors"
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
    world.barrier()
    live = {"n": -1}
    own = {"x": torch.zeros(4, dtype=torch.int64)}
    found = store.load_latest_into(live, per_rank=own)
    assert found is not None
    assert found.name == "checkpoint_0"
    assert live == {"n": 0}
    assert own["x"].tolist() == [world.rank] * 4
    world.barrier()
    if world.rank == 0:
        assert (store.path / ".keepstep" / "damaged" / "checkpoint_1").is_dir()
        (store.path / "checkpoint_0" / "state.json").write_bytes(b"{}")
    world.barrier()
    with pytest.raises((NoValidCheckpointError, RankError), match="damaged"):
        store.load_latest_into(live, per_rank=own)


def resume_elsewhere(root: str, rank: int, size: int) -> None:
    """What four ranks saved, on two."""
    world = Ranks(timeout_s=30)
    for kind in ("fsdp", "tp"):
        model, optimizer = build(kind, size, seed=4)
        objects = {"model": model, "optimizer": optimizer}
        assert Store(Path(root) / f"{kind}-4", world=world).load_latest_into(objects) is not None
        expected = Checkpoint.open(Path(root) / f"{kind}-4" / "checkpoint_0").load()
        same(whole(dict(model.state_dict())), whole(dict(expected["model"])))
        same(whole(optimizer.state_dict()["state"]), expected["optimizer"]["state"])


@pytest.mark.timeout(400)
def test_ranks_save_and_load_together(tmp_path: Path) -> None:
    run_ranks(Path(__file__), "together", 2, tmp_path)
    run_ranks(Path(__file__), "together", 4, tmp_path, timeout_s=150)
    run_ranks(Path(__file__), "resume_elsewhere", 2, tmp_path)
    model, optimizer = build("plain", 1, seed=6)
    Store(tmp_path / "tp-4").load_latest_into({"model": model, "optimizer": optimizer})
    values = Store(tmp_path / "tp-4").latest()
    assert values is not None
    same(dict(model.state_dict()), dict(values.load()["model"]))
    assert values.verify().sound
    torch.manual_seed(5)
    state = Store(tmp_path / "replicated-4").latest().load()  # type: ignore[union-attr]
    same(state, replicated())


def test_one_process_saves_what_is_its_own_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"w": torch.ones(2)}, per_rank={"seed": 3, "rng": torch.arange(2)})
    own = {"seed": 0, "rng": torch.zeros(2, dtype=torch.int64)}
    store.load_latest_into({"w": torch.zeros(2)}, per_rank=own)
    assert own["seed"] == 3
    assert own["rng"].tolist() == [0, 1]
    assert store.latest().verify().sound  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="rank-00000"):
        store.save({"rank-00000": torch.ones(1)}, per_rank=1)


# ------------------------------------------------------------------------------------------ faults


class Stopping(LocalFiles):
    """Stops its process for good, or kills it, at the n-th segment or at the rename."""

    def __init__(self, at: str, how: str) -> None:
        super().__init__()
        self.at, self.how, self.count = at, how, 0

    def _hit(self, what: str) -> None:
        if what == self.at:
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        self._hit(f"segment {self.count}")
        self.count += 1
        return super().create_segment(path, size_bytes, durable=durable)

    def rename(self, source: Path, target: Path) -> None:
        if target.name.startswith("checkpoint_"):
            self._hit("before rename")
        super().rename(source, target)
        if target.name.startswith("checkpoint_"):
            self._hit("after rename")


def faulty(argument: str, rank: int, size: int) -> None:
    """One rank dies or stalls in the second save; the others say who."""
    said = json.loads(argument)
    files = Stopping(said["at"], said["how"]) if rank == said["victim"] else LocalFiles()
    store = Store(said["root"], world=Ranks(timeout_s=4), files=files)
    state = {f"g{n}": {"w": torch.full((5 * MIB,), float(n))} for n in range(6)}
    if isinstance(files, Stopping):
        files.at, at = "", files.at
    store.save(state, step=0)
    if isinstance(files, Stopping):
        files.at, files.count = at, 0
    for group in state.values():
        group["w"] += 1  # or nothing would be written
    began = time.monotonic()
    try:
        store.save(state, step=1)
        print("SAVED", flush=True)
    except RankMissingError as error:
        print("MISSING", list(error.ranks), round(time.monotonic() - began), flush=True)
    except RankError as error:
        print("FAILED", error, flush=True)


FAULTS = [
    ("segment 0", "kill", 1, "checkpoint_0"),
    ("segment 1", "stop", 1, "checkpoint_0"),
    pytest.param("segment 0", "stop", 0, "checkpoint_0", marks=pytest.mark.soak),  # it serves the store
    pytest.param("before rename", "kill", 0, "checkpoint_0", marks=pytest.mark.soak),
    pytest.param("after rename", "kill", 0, "checkpoint_1", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("at", "how", "victim", "newest"), FAULTS)
def test_a_rank_that_dies_or_hangs_is_named_and_leaves_no_checkpoint(
    tmp_path: Path, at: str, how: str, victim: int, newest: str
) -> None:
    said = json.dumps({"root": str(tmp_path), "at": at, "how": how, "victim": victim})
    ranks = RankProcesses(Path(__file__), "faulty", 3, said, timeout_s=60)
    try:
        for output in ranks.outputs([rank for rank in range(3) if rank != victim]):
            assert f"MISSING [{victim}]" in output
            assert "DONE" in output
    finally:
        ranks.kill()
    store = Store(tmp_path)
    latest = store.latest()
    assert latest is not None
    assert latest.name == newest
    assert latest.verify().sound
    store.save({"n": 1})  # the next process that writes sweeps what was left
    assert not list(tmp_path.glob("*.tmp-*"))
