"""States, worlds and directories that ranks should not have, and what becomes of them."""

from __future__ import annotations

import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from tests.ranks.spawn import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import keepstep
from keepstep import Checkpoint, Store
from keepstep.checkpoint.format.manifest import Chunk
from keepstep.checkpoint.saving.ranks import Shard as Piece
from keepstep.checkpoint.saving.ranks import plan_ranks
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.errors import MismatchError, RankError, RanksDifferError, StoreError, UsageError
from keepstep.files import LocalFiles, SegmentFile
from keepstep.world import Ranks


def edges(root: str, rank: int, size: int) -> None:
    """Each check on all ranks, one after another, since each start of the processes costs seconds."""
    world, mesh = Ranks(timeout_s=30), init_device_mesh("cpu", (size,))
    failed = []
    for check in (
        _what_shares_memory_no_more_is_stored_apart,
        _worlds_made_anew_hear_no_old_news,
        _a_store_made_anew_on_one_rank_joins_in,
        _the_same_tensors_in_another_order_are_told,
        _sharded_tensors_of_any_size_come_back,
        _sums_that_are_not_added_up_are_no_damage,
        _a_directory_that_one_rank_does_not_see_is_no_damage,
        _modules_with_a_state_of_their_own_are_cut_again,
        _parts_go_into_memory_that_is_not_dense,
        _a_write_to_a_shard_while_it_is_copied_is_not_committed,
        _room_is_made_for_what_all_ranks_write,
        _a_handler_that_saves_in_the_middle_of_a_save_is_refused,
        _one_element_of_any_stride_travels,
    ):
        world.barrier()
        try:
            check(Path(root), world, mesh)
        except Exception:  # noqa: BLE001  (the others are to be told of as well)
            failed.append(check.__name__)
            traceback.print_exc()
    assert not failed, failed


def _what_shares_memory_no_more_is_stored_apart(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    store, weight = Store(root / "tied", world=world), torch.arange(4.0)
    store.save({"m": {"a": weight, "b": weight}})
    store.save({"m": {"a": weight, "b": weight + 100}})
    assert store.get("checkpoint_1").load()["m"]["b"].tolist() == [100, 101, 102, 103]
    store.save({"m": {"a": weight, "b": weight}})
    assert store.get("checkpoint_2").tensors["m/b"].alias_of == "m/a"
    store.save({"m": {"a": weight, "b": weight[:]}, "n": 1})  # another view, the same memory
    assert store.get("checkpoint_3").tensors["m/b"].alias_of == "m/a"


def _worlds_made_anew_hear_no_old_news(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    Ranks(timeout_s=30).exchange("old")
    if world.rank == 1:
        time.sleep(0.5)
    assert Ranks(timeout_s=30).exchange("new") == ["new"] * world.size
    for step in range(3):
        with Ranks(timeout_s=30).meeting("anew") as meeting:
            if world.rank == step % world.size:
                time.sleep(0.1)
            assert meeting.exchange(b"%d" % step) == [b"%d" % step] * world.size


def _a_store_made_anew_on_one_rank_joins_in(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    state = {f"g{n}": {"w": torch.full((5 << 20,), float(n))} for n in range(3)}  # all ranks write
    store = Store(root / "anew", world=world)
    store.save(state)
    if world.rank == 1:
        store = Store(root / "anew", world=world)
    assert store.save(state).verify().sound
    assert sorted(Checkpoint.open(root / "anew" / "checkpoint_1").load()) == ["g0", "g1", "g2"]


def _the_same_tensors_in_another_order_are_told(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    state = {"a": torch.ones(2), "b": torch.ones(3)}
    if world.rank == 1:
        state = dict(reversed(state.items()))
    with pytest.raises(RankError, match="rank 1: the same tensors as rank 0 in another order"):
        Store(root / "order", world=world).save(state)


def _sharded_tensors_of_any_size_come_back(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    for shape, placement in (
        ((10, 3), Shard(0)), ((3, 5), Shard(1)), ((1, 4), Shard(0)), ((7,), Replicate()),
        ((0, 4), Shard(0)), ((0, 4), Shard(1)), ((4, 0), Shard(0)), ((), Replicate()),
    ):  # fmt: skip
        values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
        state = {"m": {"w": distribute_tensor(values, mesh, [placement])}}
        store = Store(root / f"of {shape} {placement}", world=world)
        store.save(state)
        other = Replicate() if not shape else Shard(len(shape) - 1)
        live = distribute_tensor(torch.full(shape, -1.0), mesh, [other])
        store.load_latest_into({"m": {"w": live}})
        assert torch.equal(live.full_tensor(), values), shape
        path = root / f"dcp of {shape} {placement}"
        torch_dcp.save(state, storage_writer=keepstep.dcp.StorageWriter(path))
        assert torch.equal(Checkpoint.open(path).load()["m"]["w"], values), shape
        assert Checkpoint.open(path).verify().sound


def _sums_that_are_not_added_up_are_no_damage(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    store = Store(root / "partial", world=world)
    store.save({"w": distribute_tensor(torch.ones(4), mesh, [Replicate()])})
    live = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(MismatchError, match="which part of it lies here"):
        store.load_latest_into({"w": live})
    assert (root / "partial" / "checkpoint_0").is_dir()


def _a_directory_that_one_rank_does_not_see_is_no_damage(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    """As when each machine has a disk of its own under the same name."""
    store = Store(root / "unseen", world=world)
    store.save({"n": 1})
    if world.rank == 1:
        store._backend.checkpoints = list  # type: ignore[method-assign]
    with pytest.raises(StoreError, match=r"ranks \[1\] don't see it"):
        store.load_latest_into({"n": 0})
    assert (root / "unseen" / "checkpoint_0").is_dir()


class _Linear(torch.nn.Linear):
    got: Any = None

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        self.got = state


def _modules_with_a_state_of_their_own_are_cut_again(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    store, modules = Store(root / "extra", world=world), [_Linear(4, 5), _Linear(4, 5)]
    for module in modules:
        fully_shard(module, mesh=mesh)
    store.save({"m": modules[0]})
    store.load_latest_into({"m": modules[1]})
    whole = [module.weight.full_tensor() for module in modules]  # type: ignore[attr-defined]
    assert torch.equal(*whole)
    assert modules[1].got == {"calls": 3}


def _parts_go_into_memory_that_is_not_dense(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    values, store = torch.arange(24.0).reshape(6, 4), Store(root / "strided", world=world)
    store.save({"w": distribute_tensor(values, mesh, [Shard(0)])})
    rows = 6 // world.size
    local = torch.zeros(4, rows).t()
    live = DTensor.from_local(local, mesh, [Shard(0)], shape=(6, 4), stride=(1, 6), run_check=False)
    store.load_latest_into({"w": live})
    assert local.tolist() == values[world.rank * rows : (world.rank + 1) * rows].tolist()


class _Slow(LocalFiles):
    def make_unfinished(self, path: Path) -> None:
        time.sleep(0.3)
        super().make_unfinished(path)


def _a_write_to_a_shard_while_it_is_copied_is_not_committed(
    root: Path, world: Ranks, mesh: DeviceMesh
) -> None:
    """Torch does not count what operations on many tensors write to shards: they are copied before."""
    store = Store(root / "overlapped", world=world, files=_Slow())
    live = distribute_tensor(torch.zeros(1 << 20), mesh, [Shard(0)])
    pending = store.save_in_background({"w": live}, staging="overlapped")
    torch._foreach_add_([live], 1)
    assert pending.wait().load()["w"].unique().tolist() == [0]


def _room_is_made_for_what_all_ranks_write(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    asked: list[int] = []
    store = Store(root / "room", world=world)
    store._upkeep.before_save = lambda needed, *_: asked.append(needed)  # type: ignore[method-assign]
    store.save(
        {f"g{n}": {"w": torch.zeros(5 << 20)} for n in range(world.size)}, per_rank=torch.ones(1 << 20)
    )
    whole = world.size * (24 << 20)
    assert world.rank or whole <= asked[0] < whole + (1 << 20)


class _Signalling(LocalFiles):
    """Sends this process a signal while a save is under way."""

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.3)
        return super().create_segment(path, size_bytes, durable=durable)


def _a_handler_that_saves_in_the_middle_of_a_save_is_refused(
    root: Path, world: Ranks, mesh: DeviceMesh
) -> None:
    """It would wait for ever for a meeting that only it can end."""
    store, state = Store(root / "handler", world=world, files=_Signalling()), {"w": torch.ones(5 << 20)}
    before = signal.signal(signal.SIGUSR1, lambda *_: store.save(state) and None)
    try:
        with pytest.raises((UsageError, RankError), match="handler of a signal"):
            store.save(state)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        assert store.save(state).name == "checkpoint_0"
    finally:
        signal.signal(signal.SIGUSR1, before)


def _one_element_of_any_stride_travels(root: Path, world: Ranks, mesh: DeviceMesh) -> None:
    odd = torch.full((2,), float(world.rank))[::2]
    assert odd.stride() == (2,)
    assert world.gather(odd).tolist() == [float(rank) for rank in range(world.size)]
    assert world.reduce(odd, "sum").tolist() == [sum(range(world.size))]
    assert world.broadcast_tensors(odd, world.size - 1).tolist() == [world.size - 1]


@pytest.mark.timeout(200)
def test_ranks_at_the_edges(tmp_path: Path) -> None:
    run_ranks(Path(__file__), "edges", 2, tmp_path, timeout_s=150)


# --------------------------------------------------------------------------------- in one process


def test_what_no_rank_wrote_is_not_committed() -> None:
    def chunk(at: int) -> Chunk:
        return Chunk(at=(at,), shape=(2,), file="f", offset=0, bytes=8, digest="")

    reports = [Report(files={}, tensors={}, chunks=[("m/w", "float32", (4,), chunk(at))]) for at in (0, 0)]
    with pytest.raises(RanksDifferError, match="not the whole tensor"):
        merge(reports)


def test_a_tensor_without_elements_has_one_piece() -> None:
    def piece(at: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
        return Piece("m/w", "m", "w", "float32", 4, (0, 4), at, shape)

    pieces = [piece((0, 0), (0, 2)).pieces(), piece((0, 2), (0, 2)).pieces()]
    assert [len(held) for held in pieces] == [1, 0]
    assert len(plan_ranks([], pieces).shares[0]) == 1


def test_names_that_would_be_one_are_refused_by_dcp(tmp_path: Path) -> None:
    writer = keepstep.dcp.StorageWriter(tmp_path / "c")
    state: dict[str, Any] = {"a": {"b/c": torch.ones(2)}, "a/b": {"c": torch.zeros(2)}}
    with pytest.raises(CheckpointException, match="would both be stored as 'a/b/c'"):
        torch_dcp.save(state, storage_writer=writer, no_dist=True)
    with pytest.raises(CheckpointException, match="root key 'objects-00000'"):
        torch_dcp.save({"objects-00000": {"x": torch.ones(2)}}, storage_writer=writer, no_dist=True)


def test_dcp_never_loads_one_of_two_values_of_a_name(tmp_path: Path) -> None:
    Store(tmp_path).save({"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}, "c": torch.ones(1)})
    reader = keepstep.dcp.StorageReader(tmp_path / "checkpoint_0")
    with pytest.raises(CheckpointException, match=r"Missing key.*a\.b"):
        torch_dcp.load({"a": {"b": torch.ones(2)}}, storage_reader=reader, no_dist=True)
    target = {"c": torch.zeros(1)}
    torch_dcp.load(target, storage_reader=reader, no_dist=True)
    assert target["c"].tolist() == [1]


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf")])
def test_a_time_out_is_a_number_of_seconds(tmp_path: Path, timeout_s: float) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "meet"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="expected seconds"):
            Ranks(timeout_s=timeout_s)
    finally:
        torch.distributed.destroy_process_group()
