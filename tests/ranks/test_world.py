"""What ranks do together: they hear each other, or hear why not, and leave nothing behind."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.ranks.spawn import run_ranks

from keepstep.errors import RankFailedError, RankMissingError, UsageError
from keepstep.world import Ranks


def meet(_: str, rank: int, size: int) -> None:
    """Many checks in one start of the processes, since each start costs seconds."""
    world = Ranks(timeout_s=20)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (rank, size, rank, size)
    assert world.kind == "MULTI_CPU"
    assert world.exchange({"rank": rank}) == [{"rank": other} for other in range(size)]
    assert world.broadcast(f"from {rank}", source=size - 1) == f"from {size - 1}"
    assert world.agree(True)
    assert not world.agree(rank != size - 1)
    world.barrier()
    _steps_of_a_meeting(world)
    _tensors(world)
    _a_failing_rank_is_heard_at_once(world)
    _a_rank_that_is_interrupted_while_it_waits_tells_the_others(world)
    _a_rank_that_stays_away_is_named(world)
    _nothing_is_left(world)


def _steps_of_a_meeting(world: Ranks) -> None:
    large = bytes([world.rank]) * (9 << 20)  # more than the store takes in one value
    with world.meeting("steps") as meeting:
        assert [len(value) for value in meeting.exchange(large)] == [len(large)] * world.size
        collected = meeting.collect(str(world.rank).encode())
        assert collected == ([str(r).encode() for r in range(world.size)] if world.rank == 0 else [])
        assert meeting.broadcast(b"news" if world.rank == 0 else b"") == b"news"
        mine = meeting.scatter([b"for %d" % r for r in range(world.size)] if world.rank == 0 else [])
        assert mine == b"for %d" % world.rank


def _tensors(world: Ranks) -> None:
    rank, size = world.rank, world.size
    tree = {"rows": torch.full((3, 2), float(rank)), "flag": torch.tensor(rank == 0)}
    gathered = world.gather(tree)
    assert gathered["rows"][:, 0].tolist() == [float(r) for r in range(size) for _ in range(3)]
    assert gathered["flag"].tolist() == [r == 0 for r in range(size)]
    for dtype in (torch.bfloat16, torch.complex64, torch.int8):
        for rows in (2, 20_000):  # within the roll call, and apart
            gathered_rows = world.gather(torch.full((rows, 4), rank, dtype=dtype))
            assert gathered_rows.dtype == dtype
            assert gathered_rows[:, 3].tolist() == [r for r in range(size) for _ in range(rows)]
    assert world.gather(torch.empty(0, 3)).shape == (0, 3)
    values = torch.tensor([rank, 1])
    assert world.reduce([values], "sum")[0].tolist() == [sum(range(size)), size]
    assert world.reduce((values,), "mean")[0].tolist() == [sum(range(size)) / size, 1.0]
    assert world.reduce(values, "max").tolist() == [size - 1, 1]
    assert values.tolist() == [rank, 1]
    assert world.reduce(values, "none").tolist() == [rank, 1]
    many = torch.full((20_000,), float(rank))
    assert world.reduce(many, "sum").eq(sum(range(size))).all()
    assert world.reduce(many, "max").eq(size - 1).all()
    assert world.reduce(many.to(torch.int16), "sum").eq(sum(range(size))).all()  # gloo can't
    weight = torch.nn.Parameter(torch.full((200, 200), float(rank)).T)
    assert world.broadcast_tensors({"w": weight, "few": values}, size - 1)["w"] is weight
    assert weight.eq(size - 1).all()
    assert values.tolist() == [size - 1, 1]


def _a_failing_rank_is_heard_at_once(world: Ranks) -> None:
    began = time.monotonic()
    with pytest.raises((RankFailedError, ZeroDivisionError)) as caught, world.meeting("failing") as meeting:  # noqa: PT012
        meeting.collect(b"")
        if world.rank == world.size - 1:
            raise ZeroDivisionError("a reason")
        meeting.exchange(b"")
    assert time.monotonic() - began < 10
    if world.rank != world.size - 1:
        assert f"rank {world.size - 1} failed: ZeroDivisionError: a reason" in str(caught.value)
        assert caught.value.rank == world.size - 1  # type: ignore[union-attr]
    with world.meeting("failing") as meeting:
        assert len(meeting.exchange(b"again")) == world.size


def _a_rank_that_is_interrupted_while_it_waits_tells_the_others(world: Ranks) -> None:
    """As by Ctrl-C. Rank 0 is late, and hears of it on the way; the others wait for it."""
    last, began = world.size - 1, time.monotonic()
    if world.rank == last:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises((RankFailedError, KeyboardInterrupt)) as caught, world.meeting("waiting") as meeting:  # noqa: PT012
        while world.rank == 0 and time.monotonic() - began < 10:
            time.sleep(0.02)
            meeting.check()
        meeting.exchange(b"")
    assert (caught.type is KeyboardInterrupt) == (world.rank == last)
    assert time.monotonic() - began < 10
    if world.rank != last:
        assert caught.value.rank == last  # type: ignore[union-attr]
        assert "KeyboardInterrupt" in str(caught.value)
    world.barrier()


def _a_rank_that_stays_away_is_named(world: Ranks) -> None:
    for absent in (world.size - 1, 0):
        world.barrier()  # or a slow one would be named as well
        if world.rank != absent:
            with pytest.raises(RankMissingError, match=f"did not come within 2 s: rank {absent}") as caught:  # noqa: SIM117
                with world.meeting("absent", timeout_s=2) as meeting:
                    meeting.exchange(b"")
            assert caught.value.ranks == (absent,)
        world.barrier()
        with world.meeting("absent", timeout_s=20) as meeting:
            assert meeting.exchange(str(absent).encode()) == [str(absent).encode()] * world.size


def _nothing_is_left(world: Ranks) -> None:
    def keys() -> int:
        world.barrier()
        count = dist.distributed_c10d._get_default_store().num_keys()
        world.barrier()
        return int(count)

    before = keys()
    for _ in range(50):
        world.exchange(1)
    assert keys() <= before + 4 * world.size + 8


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_meet(size: int) -> None:
    run_ranks(Path(__file__), "meet", size)


def test_without_a_process_group_there_are_no_ranks() -> None:
    with pytest.raises(UsageError, match="init_process_group"):
        Ranks()
