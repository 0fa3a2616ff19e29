"""What did not change since the last checkpoint beside it is linked by `dcp.save`, and never stale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from tests.forked import in_fork
from tests.ranks.spawn import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

import keepstep
from keepstep import Checkpoint

MIB = 1 << 20
BASE_BYTES = 8 * MIB


class Run:
    """A frozen base (some of it sharded, if there are ranks to share it) beside an adapter that changes."""

    def __init__(self, root: Path, rank: int, size: int) -> None:
        self.root, self.rank, self.size = root, rank, size
        self.step = 0
        whole = torch.arange(BASE_BYTES // 8, dtype=torch.float32).reshape(1024, -1)
        mesh = init_device_mesh("cpu", (size,)) if size > 1 else None
        self.sharded = distribute_tensor(whole, mesh, [Shard(0)]) if mesh is not None else whole
        self.held_by_all = {f"w{n}": torch.full((BASE_BYTES // 32,), n / 7) for n in range(4)}
        self.adapter = torch.zeros(1024)

    @property
    def base(self) -> dict[str, torch.Tensor]:
        return {"sharded": self.sharded, **self.held_by_all}

    def state(self) -> dict[str, Any]:
        return {"base": self.base, "adapter": {"a": self.adapter}, "step": self.step}

    def save(self, path: str | None = None, state: Any = None, **how: Any) -> Checkpoint:
        """The next checkpoint, by a writer of its own."""
        self.step += 1
        self.adapter += 1
        final = self.root / (path or f"step_{self.step}")
        writer = keepstep.dcp.StorageWriter(final, step=self.step)
        torch_dcp.save(state or self.state(), storage_writer=writer, no_dist=self.size == 1, **how)
        return Checkpoint.open(final)

    def wait(self) -> None:
        """Until all ranks have looked."""
        if self.size > 1:
            dist.barrier()

    def assert_holds(self, checkpoint: Checkpoint) -> None:
        loaded, sharded = checkpoint.load(), self.sharded
        whole = sharded.full_tensor() if isinstance(sharded, DTensor) else sharded
        assert torch.equal(loaded["base"]["sharded"], whole)
        assert all(torch.equal(loaded["base"][name], w) for name, w in self.held_by_all.items())
        assert torch.equal(loaded["adapter"]["a"], self.adapter)


def inodes(path: Path) -> dict[int, int]:
    return {found.st_ino: found.st_size for found in (p.stat() for p in path.glob("*.safetensors"))}


def new_bytes(first: Checkpoint, second: Checkpoint) -> int:
    """Of segments in the second that are no links to files of the first."""
    old = inodes(first.path)
    return sum(size for inode, size in inodes(second.path).items() if inode not in old)


def together(root: str, rank: int, size: int) -> None:
    def run(name: str) -> Run:
        return Run(Path(root) / f"{name}-{size}", rank, size)

    _a_frozen_base(run("frozen"))
    _what_turns_out_to_rest(run("resting"))
    _a_write_that_no_counter_sees(run("written"))
    _one_directory_again_and_again(run("latest"))
    _in_the_background(run("async"))
    _after_a_load(run("loaded"))
    if size > 1:
        _a_save_that_fails(run("failing"))


def _a_frozen_base(run: Run) -> None:
    """Each further checkpoint writes what changed; each is whole by itself, whatever becomes of others."""
    made = [run.save() for _ in range(6)]
    run.assert_holds(made[-1])
    for before, after in pairwise(made):
        assert new_bytes(before, after) < MIB
    files = {entry.file or entry.chunks[0].file for name, entry in made[-1].tensors.items() if "base" in name}
    assert len(files) >= run.size  # each rank has linked what it wrote
    run.wait()
    if run.rank == 0:
        for checkpoint in made[:-1]:
            shutil.rmtree(checkpoint.path)
    run.wait()
    run.assert_holds(run.save())  # the one before is there
    assert Checkpoint.open(made[-1].path).verify().sound


def _what_turns_out_to_rest(run: Run) -> None:
    """Base and adapter in one group: found out by the third save, apart in the fourth, then linked."""
    made = [run.save(state={"model": {**run.base, "a": run.adapter}}) for _ in range(5)]
    assert new_bytes(made[0], made[1]) > MIB  # of whichever rank has the adapter beside its part
    assert new_bytes(made[3], made[4]) < MIB
    assert torch.equal(made[4].load()["model"]["a"], run.adapter)


def _a_write_that_no_counter_sees(run: Run) -> None:
    run.save()
    run.save()
    run.held_by_all["w2"].numpy()[-1] = 5.0
    if isinstance(run.sharded, DTensor) and run.rank == run.size - 1:
        run.sharded._local_tensor.numpy()[-1, -1] = 6.0
    saved = run.save()
    run.wait()
    run.assert_holds(saved)
    assert saved.load()["base"]["w2"][-1] == 5.0


def _one_directory_again_and_again(run: Run) -> None:
    """What is replaced is linked to, too; one writer or many."""
    first = inodes(run.save("latest").path)
    run.wait()
    second = run.save("latest")
    assert sum(size for inode, size in inodes(second.path).items() if inode not in first) < MIB
    run.assert_holds(second)
    writer = keepstep.dcp.StorageWriter(run.root / "latest")
    for name in ("a", "b"):
        run.adapter += 1
        torch_dcp.save(
            run.state(), checkpoint_id=run.root / name, storage_writer=writer, no_dist=run.size == 1
        )
    run.assert_holds(made := Checkpoint.open(run.root / "b"))
    assert new_bytes(Checkpoint.open(run.root / "a"), made) < MIB


def _in_the_background(run: Run) -> None:
    group = dist.new_group(backend="gloo")
    made = []
    for _ in range(3):
        run.adapter += 1
        path = run.root / f"step_{len(made)}"
        future = torch_dcp.async_save(
            run.state(), storage_writer=keepstep.dcp.StorageWriter(path), process_group=group
        )
        kept = run.adapter.clone()
        run.adapter += 100
        future.result()
        made.append(Checkpoint.open(path))
        assert torch.equal(made[-1].load()["adapter"]["a"], kept)
    assert new_bytes(made[1], made[2]) < MIB


def _after_a_load(run: Run) -> None:
    """As after a restart: what was loaded whole is linked to; what was loaded in part is not."""
    run.save("origin/step_0")
    if run.rank == 0:
        for name in ("whole", "part"):
            shutil.copytree(run.root / "origin", run.root / name)
    run.wait()
    for name, loads in (("whole", run.state()), ("part", {"adapter": {"a": torch.zeros(1024)}})):
        path = run.root / name / "step_0"
        torch_dcp.load(loads, storage_reader=keepstep.dcp.StorageReader(path), no_dist=run.size == 1)
        new = new_bytes(Checkpoint.open(path), run.save(f"{name}/step_1"))
        assert new < MIB if name == "whole" else new > BASE_BYTES, (name, new)


def _a_save_that_fails(run: Run) -> None:
    """The next one links to the last that was committed, and to nothing of the one that was not."""
    before = run.save()
    bad = {**run.state(), f"only{run.rank}": object() if run.rank else 1}
    with pytest.raises(CheckpointException, match="cannot save") as failure:
        run.save(state=bad)
    after = run.save()  # though the writer that failed is there still
    assert failure.tb is not None
    assert new_bytes(before, after) < MIB
    run.assert_holds(after)
    names = sorted(path.name for path in run.root.iterdir())
    run.wait()
    assert names == ["step_1", "step_3"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("size", [1, 2])
def test_what_did_not_change_is_linked(size: int, tmp_path: Path) -> None:
    run_ranks(Path(__file__), "together", size, tmp_path, timeout_s=150)


def test_a_forked_process_links_nothing_of_its_parents_memory(tmp_path: Path) -> None:
    """It saves on by itself: what its parent watches is not its memory."""
    run = Run(tmp_path, 0, 1)
    run.save()

    def save() -> None:
        assert new_bytes(Checkpoint.open(run.root / "step_1"), run.save("child")) > BASE_BYTES

    assert in_fork(save) == 0
    assert new_bytes(Checkpoint.open(run.root / "step_1"), run.save()) < MIB
    assert keepstep.Checkpoint.open(run.root / "child").verify().sound


IN_A_PROCESS = """
import os, sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
import keepstep

if __name__ == "__main__":
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # for the process that dcp starts; it finds a port itself
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for number in range(2):
        writer = keepstep.dcp.StorageWriter(Path(sys.argv[1], f"step_{number}"))
        state = {"w": torch.ones(1 << 20), "n": number}
        kind = AsyncCheckpointerType.PROCESS
        dcp.async_save(state, storage_writer=writer, async_checkpointer_type=kind).result()
    dist.destroy_process_group()
"""


@pytest.mark.timeout(120)
def test_a_process_of_dcps_own_saves_and_links(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(IN_A_PROCESS)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (Checkpoint.open(tmp_path / f"step_{number}") for number in range(2))
    assert second.load()["n"] == 1
    assert new_bytes(first, second) == 0
