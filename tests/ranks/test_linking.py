"""What ranks hold and did not change is linked by the rank that would have written it, and never stale."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.ranks.spawn import RankProcesses, run_ranks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from keepstep import Checkpoint, Store
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.errors import RankMissingError
from keepstep.files import LocalFiles, SegmentFile
from keepstep.world import Ranks

MIB = 1 << 20
KIB = 1 << 10


class Adapted(torch.nn.Module):
    """A frozen base of `layers` MiB beside a small adapter."""

    def __init__(self, layers: int, seed: int) -> None:
        super().__init__()
        empty = [torch.nn.Linear(512, 512, bias=False, device="meta") for _ in range(layers)]
        self.base = torch.nn.Sequential(*empty).to_empty(device="cpu")
        for number, parameter in enumerate(self.base.requires_grad_(False).parameters()):
            parameter.fill_((number + seed) / 1000)
        self.adapter = torch.nn.Sequential(torch.nn.Linear(512, 8), torch.nn.Linear(8, 512))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.adapter(self.base(x)).square().mean()


def adapted(layers: int, seed: int = 0) -> tuple[Adapted, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Adapted(layers, seed)
    return model, torch.optim.AdamW(model.adapter.parameters(), lr=0.01)


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(2, 512)).backward()
    optimizer.step()
    optimizer.zero_grad()


def bytes_on_disk(root: Path) -> int:
    """Of all segments below a directory, linked ones once."""
    files = [path.stat() for path in root.rglob("*.safetensors")]
    return sum({found.st_ino: found.st_size for found in files}.values())


def new_in(first: Checkpoint, second: Checkpoint) -> dict[str, int]:
    """Segments of the second that are no links to files of the first, and their sizes."""
    old = {path.stat().st_ino for path in first.path.iterdir()}
    found = {path.name: path.stat() for path in second.path.glob("*.safetensors")}
    return {name: at.st_size for name, at in found.items() if at.st_ino not in old}


def groups(names: Sequence[str] | dict[str, int]) -> set[str]:
    return {name.partition(".")[0].partition("-0")[0] for name in names}


def copy_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    loaded = checkpoint.load()["model"]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


# --------------------------------------------------------------------------------- all in one launch


def together(root: str, rank: int, size: int) -> None:
    world = Ranks(timeout_s=30)
    _a_frozen_base_under_ddp(Path(root) / f"ddp-{size}", world)
    if size > 1:
        _frozen_shards(Path(root) / f"fsdp-{size}", world)
    if size == 2:
        _writes_that_no_counter_sees(Path(root) / "written", world)
        _what_turns_out_to_rest(Path(root) / "resting", world)
        _what_is_a_ranks_own(Path(root) / "own", world)
        _damage_that_one_rank_found(Path(root) / "damaged", world)
        _no_links(Path(root) / "copied", world)


def _a_frozen_base_under_ddp(root: Path, world: Ranks) -> None:
    """20 checkpoints take at most 1.3 times the bytes of one; each is whole by itself."""
    model, optimizer = adapted(16 * world.size)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    store, kept, made = Store(root, world=world), [], []
    for step in range(20 if world.size == 2 else 4):
        train(wrapped, optimizer)
        made.append(store.save({"model": model, "optimizer": optimizer}, step=step))
        kept.append(copy_of(model.adapter))
        if step == 0:
            world.barrier()
            once = bytes_on_disk(root)
        elif world.rank == 0:
            new = new_in(made[-2], made[-1])
            assert sum(new.values()) < MIB, new
    base = {f"base.{name}": tensor for name, tensor in copy_of(model.base).items()}
    world.barrier()
    if world.rank == 0:
        assert bytes_on_disk(root) <= 1.3 * once, (bytes_on_disk(root), once)
        holding = {entry.file for address, entry in made[-1].tensors.items() if "/base" in address}
        assert len(holding) == world.size  # each rank links what it wrote
        for number in {0, 1, len(made) // 2, len(made) - 1}:
            adapter = {f"adapter.{name}": tensor for name, tensor in kept[number].items()}
            assert_holds(made[number], {**base, **adapter})
        _removal_in_any_order(Store(root), kept, base)
    world.barrier()
    store.save({"model": model, "optimizer": optimizer})  # those that it would have linked to are gone
    _resumed(root, world)


def _removal_in_any_order(
    store: Store, kept: list[dict[str, torch.Tensor]], base: dict[str, torch.Tensor]
) -> None:
    middle = len(kept) // 2
    for number in (0, *range(middle + 1, len(kept)), *range(1, middle)):
        store.delete(f"checkpoint_{number}")
    assert all(report.sound for report in store.verify())
    elsewhere = store.path.with_name("elsewhere")
    shutil.copytree(store.path / f"checkpoint_{middle}", elsewhere)
    store.delete(f"checkpoint_{middle}")
    adapter = {f"adapter.{name}": tensor for name, tensor in kept[middle].items()}
    assert Checkpoint.open(elsewhere).verify().sound
    assert_holds(Checkpoint.open(elsewhere), {**base, **adapter})
    shutil.rmtree(elsewhere)


def _resumed(root: Path, world: Ranks) -> None:
    """Another process of the run links to what it resumed from, and retention takes what it likes."""
    store = Store(root, world=world, retention=Retention(keep_last=2))
    model, optimizer = adapted(16 * world.size, seed=1)
    first = store.load_latest_into({"model": model, "optimizer": optimizer})
    assert first is not None
    for step in range(3):
        train(model, optimizer)
        second = store.save_in_background({"model": model, "optimizer": optimizer}, step=step).wait()
        if world.rank == 0 and step == 0:
            assert sum(new_in(first, second).values()) < MIB
    world.barrier()
    assert len(store.list()) == 2
    assert_holds(second, copy_of(model))


def _frozen_shards(root: Path, world: Ranks) -> None:
    """FSDP2: each rank links its shards."""
    model, optimizer = adapted(4)
    for layer in model.base:
        fully_shard(layer)
    fully_shard(model)
    store, made = Store(root, world=world), []
    for step in range(4):
        train(model, optimizer)
        state = {"model": model, "optimizer": optimizer}
        made.append(store.save_in_background(state, step=step).wait() if step == 2 else store.save(state))
        if step and world.rank == 0:
            assert sum(new_in(made[-2], made[-1]).values()) < MIB // 2
    now = {name: t.full_tensor().detach() for name, t in model.state_dict().items()}  # type: ignore[operator]
    assert_holds(made[-1], now)
    _, again = adapted(1), Store(root, world=world)
    assert again.load_latest_into({"model": model, "optimizer": optimizer}) is not None
    train(model, optimizer)
    resumed = again.save({"model": model, "optimizer": optimizer})
    if world.rank == 0:
        assert sum(new_in(made[-1], resumed).values()) < MIB // 2
        assert resumed.verify().sound
    world.barrier()
    model.base[0].weight.to_local()[-1:].data.fill_(3)  # type: ignore[operator, union-attr]
    changed = again.save({"model": model, "optimizer": optimizer})
    weight = model.base[0].weight.full_tensor()  # type: ignore[operator, union-attr]
    assert torch.equal(changed.load()["model"]["base.0.weight"], weight)


def _writes_that_no_counter_sees(root: Path, world: Ranks) -> None:
    """All of a group, on both ranks: through `.data`, a view, NumPy, and other memory."""
    torch.manual_seed(2)
    weights = {f"w{n}": torch.randn(2 * MIB) for n in range(4)}  # 8 MiB each, two for each rank
    store = Store(root, world=world)
    made = [store.save({"model": weights}, step=step) for step in range(3)]
    assert not new_in(made[0], made[2])
    writes = [
        lambda w: w.data[-1:].fill_(3),
        lambda w: w.view(2, -1)[1, 5:6].zero_(),
        lambda w: w.numpy().__setitem__(0, 5.0),
        lambda w: w.set_(w.clone() + 1),
    ]
    for (name, weight), write in zip(weights.items(), writes, strict=True):
        write(weight)
        made.append(store.save({"model": weights}, step=4))
        assert torch.equal(made[-1].load()["model"][name], weight), name
        new = new_in(made[-2], made[-1])
        assert len(new) == 1, new  # only the rank whose share it is writes
        world.barrier()
    assert_holds(made[2], {**made[0].load()["model"]})
    made.append(store.save({"model": weights}, step=5))
    assert not new_in(made[-2], made[-1])


def _what_turns_out_to_rest(root: Path, world: Ranks) -> None:
    """Nobody says that it is frozen: it moves to files of its own once, and back when it changes."""
    resting = {f"r{n}": torch.randn(2 * MIB) for n in range(3)}
    busy = {f"b{n}": torch.zeros(MIB) for n in range(3)}
    store, made, sizes = Store(root, world=world), [], []
    for step in range(8):
        for tensor in busy.values():
            tensor += 1
        if step == 6:
            resting["r1"] += 1
        made.append(store.save({"model": {**resting, **busy}}, step=step))
        new = new_in(made[-2], made[-1]) if step else {"": 36 * MIB}
        sizes.append(round(sum(new.values()) / MIB))
        assert_holds(made[-1], {**resting, **busy})
        world.barrier()
    assert sizes[:6] == [36, 36, 36, 36, 12, 12], sizes
    assert sizes[6] < 36, sizes


def _what_is_a_ranks_own(root: Path, world: Ranks) -> None:
    store = Store(root, world=world)
    own = {"cache": torch.full((MIB,), world.rank), "seen": torch.zeros(2)}
    first = store.save({"n": 1}, per_rank={"a": own["cache"]})
    second = store.save({"n": 2}, per_rank={"a": own["cache"]})
    assert not new_in(first, second)
    for rank in range(world.size):
        assert second.load_per_rank(rank)["a"].unique().tolist() == [rank]


def _damage_that_one_rank_found(root: Path, world: Ranks) -> None:
    """Nobody links to it, whoever found it."""
    weights = {f"w{n}": torch.randn(2 * MIB) for n in range(4)}
    store = Store(root, world=world)
    first = store.save({"model": weights})
    if world.rank == world.size - 1:
        file = sorted(first.path.glob("model-*"))[0]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert not all(report.sound for report in store.verify())
    world.barrier()
    second = store.save({"model": weights})
    assert groups(new_in(first, second)) == {"model"}
    assert_holds(second, weights)
    third = store.save({"model": weights})
    assert not new_in(second, third)


class NoLinks(LocalFiles):
    """A file system without hard links copies; the copy is a file of its own."""

    def link(self, source: Path, target: Path) -> None:
        shutil.copy2(source, target)


def _no_links(root: Path, world: Ranks) -> None:
    weights = {f"w{n}": torch.randn(2 * MIB) for n in range(4)}
    store = Store(root, world=world, files=NoLinks())
    first, second = store.save({"model": weights}), store.save({"model": weights})
    assert len(new_in(first, second)) == world.size
    assert_holds(second, weights)


def elsewhere(root: str, rank: int, size: int) -> None:
    """Another number of ranks: all is written anew, once, and linked from then on."""
    store = Store(Path(root) / "ddp-4", world=Ranks(timeout_s=30))
    model, optimizer = adapted(64, seed=3)
    first = store.load_latest_into({"model": model, "optimizer": optimizer})
    assert first is not None
    second = store.save({"model": model, "optimizer": optimizer})
    third = store.save({"model": model, "optimizer": optimizer})
    assert groups(new_in(first, second)) >= {"model"}
    assert "model" not in groups({n for n, b in new_in(second, third).items() if b > MIB})
    holding = {entry.file for address, entry in third.tensors.items() if "/base" in address}
    assert len(holding) == size
    assert_holds(third, copy_of(model))
    dist.barrier()


@pytest.mark.timeout(400)
def test_ranks_link_what_did_not_change(tmp_path: Path) -> None:
    for size in (1, 2, 4):
        run_ranks(Path(__file__), "together", size, tmp_path, timeout_s=120)
    run_ranks(Path(__file__), "elsewhere", 2, tmp_path)


# -------------------------------------------------------------------------------------------- faults


class DiesAmongLinks(LocalFiles):
    """Kills its process once a link and a new file were made, whichever comes first."""

    def __init__(self) -> None:
        self.armed = False
        self._made: set[str] = set()

    def link(self, source: Path, target: Path) -> None:
        super().link(source, target)
        self._count("link")

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        segment = super().create_segment(path, size_bytes, durable=durable)
        self._count("segment")
        return segment

    def _count(self, what: str) -> None:
        if self.armed:
            self._made.add(what)
        if len(self._made) == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def dies(argument: str, rank: int, size: int) -> None:
    said = json.loads(argument)
    files = DiesAmongLinks() if rank == said["victim"] else LocalFiles()
    store = Store(said["root"], world=Ranks(timeout_s=4), files=files)
    resting = {f"w{n}": torch.full((2 * MIB,), float(n)) for n in range(4)}
    busy = {f"w{n}": torch.full((2 * MIB,), float(n)) for n in range(4)}
    for step in range(2):
        store.save({"resting": resting, "busy": {name: tensor + step for name, tensor in busy.items()}})
    if isinstance(files, DiesAmongLinks):
        files.armed = True
    try:
        store.save({"resting": resting, "busy": {name: tensor + 5 for name, tensor in busy.items()}})
    except RankMissingError as error:
        print("MISSING", list(error.ranks), flush=True)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_among_links_harms_no_earlier_checkpoint(tmp_path: Path, victim: int) -> None:
    said = json.dumps({"root": str(tmp_path), "victim": victim})
    ranks = RankProcesses(Path(__file__), "dies", 2, said, timeout_s=60)
    try:
        (output,) = ranks.outputs([1 - victim])
        assert f"MISSING [{victim}]" in output
        assert ranks.processes[victim].wait(20) == -signal.SIGKILL
    finally:
        ranks.kill()
    store = Store(tmp_path)
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_0", "checkpoint_1"]
    assert all(report.sound for report in store.verify())
    store.save({"n": 1})  # the next process that writes sweeps what was left
    assert not list(tmp_path.glob("*.tmp-*"))
    assert store.verify()[1].sound
    loaded = store.list()[1].load()
    assert [tensor.unique().tolist() for tensor in loaded["resting"].values()] == [[0.0], [1.0], [2.0], [3.0]]
    assert [tensor.unique().tolist() for tensor in loaded["busy"].values()] == [[1.0], [2.0], [3.0], [4.0]]
