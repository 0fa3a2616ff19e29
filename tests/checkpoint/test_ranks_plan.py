"""Which rank writes what: balanced, whole, the same everywhere, and in linear time."""

from __future__ import annotations

import json
import math
import random
import time

import pytest

from keepstep.checkpoint.collector import collector_paused
from keepstep.checkpoint.format.boxes import Box, problem_of_tiling
from keepstep.checkpoint.format.manifest import Chunk, FileEntry, Manifest, TensorEntry, dump_state
from keepstep.checkpoint.saving.layout import TensorInfo
from keepstep.checkpoint.saving.rank_planner import RankPlanner
from keepstep.checkpoint.saving.ranks import CHUNK_BYTES, Plan, Shard, differences, plan_ranks
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.errors import RanksDifferError

MIB = 1 << 20


def info(group: str, name: str, size_bytes: int) -> TensorInfo:
    return TensorInfo(
        address=f"{group}/{name}", group=group, name=name, dtype="uint8", shape=(size_bytes,), itemsize=1,
        bytes=size_bytes,
    )  # fmt: skip


def shard(name: str, whole: tuple[int, ...], at: tuple[int, ...], shape: tuple[int, ...]) -> Shard:
    return Shard(f"model/{name}", "model", name, "float32", 4, whole, at, shape)


def test_replicated_tensors_are_split_evenly_and_written_once() -> None:
    rng = random.Random(0)
    tensors = [info("model", f"w{n}", rng.randrange(1, 4) * MIB) for n in range(100)]
    plan = plan_ranks(tensors, [[]] * 4)
    written = [[m for share in shares for m in share.members] for shares in plan.shares]
    assert sorted(m for members in written for m in members) == list(range(100))
    sizes = [sum(tensors[m].bytes for m in members) for members in written]
    assert max(sizes) - min(sizes) <= 3 * MIB
    files = [share.file for shares in plan.shares for share in shares]
    assert files == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    index = json.loads(plan.indexes["model.safetensors.index.json"])["weight_map"]
    assert {index[tensors[m].name] for m in written[2]} == {files[2]}
    assert plan == plan_ranks(list(tensors), [[], [], [], []])


def test_what_comes_to_rest_moves_to_another_file_and_not_to_another_rank() -> None:
    tensors = [info("model", f"w{n}", 9 * MIB) for n in range(8)]
    held = [[shard("s", (8, 6), (4 * rank, 0), (4, 6))] for rank in range(2)]
    first = plan_ranks(tensors, held)
    second = plan_ranks(tensors, held, labels=lambda infos: [n % 3 for n in range(len(infos))])

    def owners(plan: Plan) -> list[set[int]]:
        return [{member for share in shares for member in share.members} for shares in plan.shares]

    assert owners(first) == owners(second)
    assert [len(shares) for shares in first.shares] == [1, 1]
    for shares in second.shares:
        for share in shares:
            assert len({tensors.index(info) % 3 for info in map(second.tensors.__getitem__, share.members)
                        if info in tensors}) <= 1  # fmt: skip


def adopted(tensors: list[TensorInfo], files: dict[str, list[int]]) -> RankPlanner:
    """A planner of two ranks that goes on from a checkpoint whose tensors lie in these files."""
    at = {tensors[member].address: file for file, members in files.items() for member in members}
    manifest = Manifest(
        id="", created_at="", step=None, epoch=None, metrics={}, tags=(), pinned=False, parent=None, run="",
        attempt=1, environment={"world_size": 2}, files={},
    )  # fmt: skip
    planner = RankPlanner(2)
    planner.adopt(
        "checkpoint_3",
        manifest,
        {
            info.address: TensorEntry(
                dtype="uint8", shape=info.shape, offset=0, file=at[info.address], bytes=1
            )
            for info in tensors
        },
    )
    return planner


def files_of(planner: RankPlanner, tensors: list[TensorInfo], held: list[list[Shard]]) -> list[list[int]]:
    planner.decide(tensors, held)
    assert planner.plan is not None
    return sorted(
        sorted(share.members)
        for shares in planner.plan.shares
        for share in shares
        if share.file.startswith("model")
    )


def test_a_resumed_run_keeps_the_files_of_its_checkpoint_unless_others_write_them_now() -> None:
    tensors = [info("model", f"w{n}", 9 * MIB) for n in range(8)]
    before = files_of(RankPlanner(2), tensors, [[], []])
    files = {f"model-{n}.safetensors": members[part] for n, (members, part) in enumerate(
        (members, part) for members in before for part in (slice(0, 2), slice(2, None))
    )}  # fmt: skip
    assert files_of(adopted(tensors, files), tensors, [[], []]) == sorted(files.values())
    piece = shard("s", (8 * MIB, 1), (0, 0), (7 * MIB, 1))._replace(group="other", address="other/s")
    moved = [[piece], [piece._replace(at=(7 * MIB, 0), shape=(MIB, 1))]]  # rank 0 has more to write already
    assert len(files_of(adopted(tensors, files), tensors, moved)) == 2


def test_small_groups_stay_together_and_go_to_whoever_has_least() -> None:
    tensors = [info("a", f"w{n}", MIB) for n in range(5)] + [info("b", "x", 10), info("c", "y", 10)]
    plan = plan_ranks(tensors, [[]] * 3)
    assert [[share.file for share in shares] for shares in plan.shares] == [
        ["a.safetensors"], ["b.safetensors"], ["c.safetensors"],
    ]  # fmt: skip
    alone = plan_ranks(tensors, [[]])
    assert [share.file for share in alone.shares[0]] == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert not alone.indexes


def test_statistics_of_a_large_model_come_from_one_rank() -> None:
    weights = [info("model", f"w{n}", 20 * MIB) for n in range(6)]
    statistics = [info("model", f"running_{n}", 4096 * (n + 1)) for n in range(12)]
    plan = plan_ranks([*weights, *statistics], [[]] * 3)
    members = [{m for share in shares for m in share.members} for shares in plan.shares]
    assert all(members)
    assert sum(bool(of_rank & set(range(6, 18))) for of_rank in members) == 1


def test_each_distinct_shard_is_written_once_by_a_rank_that_holds_it() -> None:
    whole = (8, 6)
    held = [
        [shard("w", whole, (0, 0), (4, 6))], [shard("w", whole, (4, 0), (4, 6))],
        [shard("w", whole, (0, 0), (4, 6))], [shard("w", whole, (4, 0), (4, 6))],
    ]  # fmt: skip
    plan = plan_ranks([info("model", "b", 7)], held)
    writers = [rank for rank, shares in enumerate(plan.shares) if any(1 in s.members for s in shares)]
    assert len(writers) == 2
    assert {held[rank][0].at for rank in writers} == {(0, 0), (4, 0)}
    assert not plan.indexes  # whoever goes by an index looks for whole tensors


def test_shards_are_cut_into_chunks() -> None:
    large = shard("w", (100_000, 1024), (20_000, 0), (50_000, 1024))
    pieces = large.pieces()
    assert all(piece.info.bytes <= CHUNK_BYTES for piece in pieces)
    assert len(pieces) == math.ceil(large.info.bytes / CHUNK_BYTES)
    moved = [Box((p.at[0] - 20_000, p.at[1]), p.shape) for p in pieces]
    assert problem_of_tiling((50_000, 1024), moved) is None
    assert shard("w", (3, 2), (3, 0), (0, 2)).pieces() == []
    assert len(shard("w", (3, 1 << 26), (0, 0), (2, 1 << 26)).pieces()) == 2  # a row is never cut
    assert len(shard("w", (1 << 20, 64), (0, 0), (1 << 20, 64)).pieces()) == 1  # nor is a whole tensor


def test_shards_that_are_not_the_whole_tensor_are_refused() -> None:
    with pytest.raises(RanksDifferError, match=r"'model/w' .* have 24 elements, the tensor 48"):
        plan_ranks([], [[shard("w", (8, 6), (0, 0), (4, 6))], []])


def test_differences_name_ranks_and_the_first_tensors() -> None:
    first = [["model/a", "float32", [2]], ["model/b", "float32", [2]]]
    assert differences([first, first]) is None
    second = [["model/a", "float32", [3]], ["model/c", "float32", [2]]]
    assert differences([first, first, second]) == (
        "  rank 2: model/b is only on rank 0; model/c is only on rank 2; "
        "model/a is float32[3] on rank 2, float32[2] on rank 0"
    )


def report(rank: int, count: int, ranks: int = 3) -> Report:
    name = f"model-{rank:05d}.safetensors"
    return Report(
        files={name: FileEntry(bytes=4096 + 8 * count, digest="0" * 32, header_bytes=4096)},
        tensors={
            f"model/{rank}.{n}": TensorEntry(
                dtype="float32", shape=(1,), offset=4096 + 8 * n, file=name, bytes=4, digest="0" * 32
            )
            for n in range(count)
        },
        chunks=[
            (f"model/s{n}", "float32", (ranks, 1),
             Chunk(at=(rank, 0), shape=(1, 1), file=name, offset=4100 + 8 * n, bytes=4, digest="0" * 32))
            for n in range(count)
        ],
        tree={"rank": rank},
    )  # fmt: skip


def test_reports_travel_and_merge() -> None:
    reports = [Report.load(report(rank, 3).dump()) for rank in range(3)]
    assert reports[1] == report(1, 3)
    files, tensors = merge(reports, order=["model/s2", "model/1.0"])
    assert list(files) == [f"model-{rank:05d}.safetensors" for rank in range(3)]
    assert list(tensors)[:2] == ["model/s2", "model/1.0"]
    assert [chunk.at for chunk in tensors["model/s0"].chunks] == [(0, 0), (1, 0), (2, 0)]
    assert tensors["model/s0"].bytes == 12


def plan_time_s(count: int) -> float:
    tensors = [info(f"g{n % 7}", f"w{n}", 1000 + n % 13) for n in range(count)]
    began = time.perf_counter()
    with collector_paused():
        plan_ranks(tensors, [[]] * 8)
    return time.perf_counter() - began


def merge_time_s(ranks: int) -> float:
    sent = [report(rank, 40, ranks).dump() for rank in range(ranks)]
    began = time.perf_counter()
    with collector_paused():
        _, tensors = merge([Report.load(data) for data in sent])
        dump_state({}, tensors)
    return time.perf_counter() - began


@pytest.mark.parametrize(("work", "size"), [(plan_time_s, 10_000), (merge_time_s, 32)])
def test_time_grows_linearly(work: object, size: int) -> None:
    """Eight times the work in at most thirty times the time (the square would be 64), at best of three."""
    assert callable(work)
    assert min(work(8 * size) for _ in range(3)) < 30 * min(work(size) for _ in range(3))


def test_two_ranks_never_write_one_file() -> None:
    files = {"rank-00001.safetensors": FileEntry(bytes=1, digest="")}
    reports = [Report(files=files, tensors={}, chunks=[]), Report(files=files, tensors={}, chunks=[])]
    with pytest.raises(RanksDifferError, match=r"two ranks wrote rank-00001\.safetensors"):
        merge(reports)
