"""Ranks that save to one bucket: each uploads its share, rank 0 puts the manifest."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.buckets.server import Server
from tests.buckets.test_accelerator import train as train_in
from tests.buckets.test_store import keys
from tests.ranks.spawn import RankProcesses, run_ranks
from tests.ranks.training import build, same, train, whole

from keepstep import ProjectConfiguration, Retention, Store
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import RankError, RankFailedError, RankMissingError
from keepstep.world import Ranks

MIB = 1 << 20
Open = Callable[..., Store]


def weights(count: int, value: float = 0.0) -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.full((2 * MIB,), float(n + value)) for n in range(count)}  # 8 MiB each


def objects_of(store: Store) -> Objects:
    found = store._backend._objects  # type: ignore[attr-defined]
    assert isinstance(found, Objects)
    return found


def uploaded(store: Store, name: str) -> set[str]:
    """What lies under a checkpoint's own prefix."""
    return {key.partition("/")[2] for key in keys(store) if key.startswith(f"{name}/")}


# --------------------------------------------------------------------------------- all in one launch


def together(argument: str, rank: int, size: int) -> None:
    said = json.loads(argument)

    def open_store(name: str, **more: Any) -> Store:
        world = Ranks(timeout_s=30)
        return Store(f"{said['address']}/{name}", storage_options=said["options"], world=world, **more)

    _shares_and_links(open_store("replicated"), rank, size)
    _a_rank_that_raises(open_store("failing"), rank)
    _shards(open_store("sharded"), rank, size)
    _retention(open_store("pruned", retention=Retention(keep_last=1)))
    _a_run(f"{said['address']}/project", said["options"])
    _what_the_mirror_alone_has_comes_to_all_or_to_none(said, rank)
    dist.barrier()


def _shares_and_links(store: Store, rank: int, size: int) -> None:
    base, state = weights(3), weights(3, 0.5)
    first = store.save({"base": base, "model": state}, step=0, per_rank={"rank": rank})
    for tensor in state.values():
        tensor += 1
    pending = store.save_in_background({"base": base, "model": state}, step=1, per_rank={"rank": rank})
    second = pending.wait()
    assert second.name == "checkpoint_1"
    assert str(second.place) == f"{store.address}/checkpoint_1"
    for checkpoint in (first, second):
        holding = {str(entry.file) for entry in checkpoint.tensors.values() if entry.bytes}
        assert len([name for name in holding if name.startswith("model")]) == size
    linked = {name for name, entry in second.manifest.files.items() if entry.within == "checkpoint_0"}
    assert linked == {f"base-{n + 1:05d}-of-{size:05d}.safetensors" for n in range(size)}
    assert not linked & uploaded(store, "checkpoint_1")
    same(dict(second.load()), {"base": base, "model": state})
    assert [second.load_per_rank(number)["rank"] for number in range(size)] == list(range(size))
    live, own = {"base": weights(3, 9), "model": weights(3, 9)}, {"rank": -1}
    assert store.load_latest_into(live, per_rank=own) is not None
    same(live, {"base": base, "model": state})
    assert own == {"rank": rank}


def _a_rank_that_raises(store: Store, rank: int) -> None:
    state: dict[str, Any] = weights(3)
    store.save(state, step=0)
    upload = Objects.upload

    def refuse(self: Objects, key: str, parts: Iterable[memoryview]) -> None:
        for _ in parts:
            raise OSError(5, "cut off")

    if rank == 1:
        Objects.upload = refuse  # type: ignore[method-assign]
    with pytest.raises(Exception, match="cut off") as caught:
        store.save({name: tensor + 1 for name, tensor in state.items()}, step=1)
    Objects.upload = upload  # type: ignore[method-assign]
    assert isinstance(caught.value, RankFailedError) == (rank != 1)
    dist.barrier()
    assert uploaded(store, "checkpoint_1") == {
        "claim.json",
        "manifest.json",
    }  # empty
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_0"]
    assert store.save(state, step=2).name == "checkpoint_2"
    dist.barrier()


def _shards(store: Store, rank: int, size: int) -> None:
    model, optimizer = build("fsdp", size)
    train(model, optimizer)
    large = torch.distributed.tensor.distribute_tensor(
        torch.arange(4.0 * MIB).reshape(64, -1), model[0].up.weight.device_mesh,  # type: ignore[union-attr]
        [torch.distributed.tensor.Shard(0)],
    )  # fmt: skip
    store.save({"model": model, "optimizer": optimizer, "large": large})
    before = whole(model.state_dict())
    model, optimizer = build("fsdp", size, seed=3)
    _load_only_what_is_needed(store, {"model": model, "optimizer": optimizer}, large, size)
    same(whole(model.state_dict()), before)


def _load_only_what_is_needed(store: Store, objects: dict[str, Any], like: Any, size: int) -> None:
    """16 MiB in shards: each rank reads its part of them."""
    read, read_into = [0], Objects.read_into

    def count(self: Objects, key: str, view: memoryview, offset: int) -> int:
        read[0] += len(view)
        return read_into(self, key, view, offset)

    live = {**objects, "large": like.detach().clone().zero_()}
    Objects.read_into = count  # type: ignore[method-assign]
    try:
        assert store.load_latest_into(live) is not None
    finally:
        Objects.read_into = read_into  # type: ignore[method-assign]
    same(whole(live["large"]), torch.arange(4.0 * MIB).reshape(64, -1))
    assert 16 * MIB // size <= read[0] < 16 * MIB // size + MIB, read


def _retention(store: Store) -> None:
    base = weights(2)
    for step in range(3):
        last = store.save({"base": base, "n": step}, step=step)
    dist.barrier()
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_2"]
    assert last.verify().sound
    assert {entry.within for entry in last.manifest.files.values()} == {None, "checkpoint_0"}
    dist.barrier()


def _a_run(address: str, options: dict[str, Any]) -> None:
    """Automatic checkpoints, and going on with them."""
    project = ProjectConfiguration(project_dir=address, storage_options=options)
    first, second = train_in(project, 2), train_in(project, 4)
    assert (first[0], second[0]) == (0, 2)
    assert first[1] != second[1]


def _what_the_mirror_alone_has_comes_to_all_or_to_none(said: dict[str, Any], rank: int) -> None:
    def open_mirrored(name: str) -> Store:
        mirror = f"{said['address']}/mirror"
        path, world = Path(said["folder"]) / name, Ranks(timeout_s=30)
        return Store(path, mirror=mirror, storage_options=said["options"], world=world)

    store = open_mirrored("here")
    store.save({"n": 7}, step=7)
    store.close()
    dist.barrier()
    store, live = open_mirrored("fresh"), {"n": 0}
    if rank == 0:
        assert store.latest() is None
    dist.barrier()
    assert store.latest() is None, "rank 0 has brought it"
    assert store.load_latest_into(live) is not None
    assert live == {"n": 7}
    latest = store.latest()
    assert latest is not None
    assert latest.step == 7


def elsewhere(argument: str, rank: int, size: int) -> None:
    """Another number of ranks."""
    said = json.loads(argument)
    store = Store(f"{said['address']}/sharded", storage_options=said["options"], world=Ranks(timeout_s=30))
    model, optimizer = build("fsdp", size, seed=5)
    large = torch.distributed.tensor.distribute_tensor(
        torch.zeros(64, MIB // 16), model[0].up.weight.device_mesh,  # type: ignore[union-attr]
        [torch.distributed.tensor.Shard(0)],
    )  # fmt: skip
    assert store.load_latest_into({"model": model, "optimizer": optimizer, "large": large}) is not None
    expected = store.list()[0].load()
    same(whole(dict(model.state_dict())), whole(dict(expected["model"])))
    same(whole(large), expected["large"])


@pytest.mark.timeout(300)
def test_ranks_save_to_a_bucket_and_load_from_it(server: Server, address: str, tmp_path: Path) -> None:
    said = json.dumps({"address": address, "options": server.options(), "folder": str(tmp_path)})
    outputs = run_ranks(Path(__file__), "together", 2, said, timeout_s=120)
    assert ["latest() does not look into the mirror" in output for output in outputs] == [True, False]
    run_ranks(Path(__file__), "elsewhere", 4, said)
    store = Store(f"{address}/replicated", storage_options=server.options())
    store.delete("checkpoint_0")  # by another process; the links hold what they need
    (left,) = store.list()
    assert left.verify().sound
    assert torch.equal(left.load()["base"]["w2"], weights(3)["w2"])
    model, _ = build("plain", 1, seed=6)
    (sharded,) = Store(f"{address}/sharded", storage_options=server.options()).list()
    sharded.load_into({"model": model}, only="model")
    same(dict(model.state_dict()), dict(sharded.load()["model"]))


# -------------------------------------------------------------------------------------------- faults


def falls_out(argument: str, rank: int, size: int) -> None:
    """One rank is killed, or stopped, while parts of its second upload are on their way."""
    said = json.loads(argument)
    store = Store(said["address"], storage_options=said["options"], world=Ranks(timeout_s=5))
    store.save({"model": weights(4)}, step=0)
    if rank == said["victim"]:
        upload = Objects.upload

        def fall_out_between_parts(self: Objects, key: str, parts: Iterable[memoryview]) -> None:
            def some() -> Iterator[memoryview]:
                for number, part in enumerate(parts):
                    if number == 2:
                        os.kill(os.getpid(), said["signal"])
                    yield part

            upload(self, key, some())

        Objects.upload = fall_out_between_parts  # type: ignore[method-assign]
    try:
        store.save({"model": weights(4, 1), "small": torch.ones(3)}, step=1)
        print("SAVED", flush=True)
    except RankMissingError as error:
        print("MISSING", list(error.ranks), flush=True)
    except RankError as error:
        print("FAILED", error, flush=True)


def fall_out(server: Server, address: str, victim: int, number: signal.Signals) -> RankProcesses:
    """The ranks; the one that is no victim has ended, having named it."""
    said = {"address": address, "options": server.options(), "victim": victim, "signal": number}
    ranks = RankProcesses(Path(__file__), "falls_out", 2, json.dumps(said), timeout_s=60)
    try:
        (output,) = ranks.outputs([1 - victim])
        assert f"MISSING [{victim}]" in output
    except BaseException:
        ranks.kill()
        raise
    return ranks


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_it_uploads_leaves_no_checkpoint(
    server: Server, address: str, bucket_store: Open, victim: int
) -> None:
    ranks = fall_out(server, address, victim, signal.SIGKILL)
    assert ranks.processes[victim].wait(20) == -signal.SIGKILL
    _earlier_ones_are_whole(bucket_store())


def _earlier_ones_are_whole(store: Store) -> None:
    latest = store.latest()
    assert latest is not None
    assert latest.name == "checkpoint_0"
    assert uploaded(store, "checkpoint_1") <= {"claim.json", "manifest.json", "small.safetensors"}
    assert store.save({"n": 1}, step=2).name == "checkpoint_2"  # the number is burned
    assert uploaded(store, "checkpoint_1") <= {"claim.json", "manifest.json"}  # swept
    assert [report.sound for report in store.verify()] == [True, True]
    assert torch.equal(store.list()[0].load()["model"]["w3"], weights(4)["w3"])


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_a_rank_that_goes_on_after_it_was_given_up_removes_what_it_uploads(
    server: Server, address: str, bucket_store: Open
) -> None:
    ranks = fall_out(server, address, 1, signal.SIGSTOP)
    try:
        ranks.send(1, signal.SIGCONT)
        (output,) = ranks.outputs([1])
        assert "SAVED" not in output
        assert "MISSING" in output or "FAILED" in output
    finally:
        ranks.kill()
    assert uploaded(bucket_store(), "checkpoint_1") == {"claim.json", "manifest.json"}
    _earlier_ones_are_whole(bucket_store())
