"""Calls that ranks don't make alike: an error on every rank at once that names ranks, shapes and lines."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.ranks.spawn import RankProcesses, run_ranks

from keepstep.errors import (
    CollectiveMismatchError,
    NotTensorError,
    RankFailedError,
    RankMissingError,
    UsageError,
)
from keepstep.world import Ranks


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def disagree(_: str, rank: int, size: int) -> None:
    """Many checks in one start of the processes."""
    world = Ranks(timeout_s=30)
    last = rank == size - 1
    for check in (
        _shapes,
        _dtypes,
        _structure,
        _different_calls,
        _bad_input_on_one_rank,
        _a_block_that_fails,
    ):
        began = time.monotonic()
        check(world, last)
        assert time.monotonic() - began < 10, check.__name__  # no time-out was waited for
        assert world.gather(torch.tensor(rank)).tolist() == list(range(size))  # and the world goes on
    _the_witnesses_go_with_rank_0(world)


def _the_witnesses_go_with_rank_0(world: Ranks) -> None:
    """Or they would look into a store that is gone."""
    world.barrier()
    witness = world._roll_call()._witness
    if world.rank == 0:
        witness.stop()
    witness._thread.join(10)
    assert not witness._thread.is_alive()


def _caught(call: Callable[[], object]) -> CollectiveMismatchError:
    with pytest.raises(CollectiveMismatchError) as caught:
        call()
    return caught.value


def _shapes(world: Ranks, last: bool) -> None:
    tree = {"loss": torch.ones(()), "logits": [Pair(torch.ones(2, 3), torch.ones(5 if last else 4, 3))]}
    error = _caught(lambda: world.gather(tree))
    where = re.escape(f"{__file__}:") + r"\d+ in <lambda>"
    assert re.search(
        rf"^gather: what the ranks gave it differs \(call \d+\):\n"
        rf"  ranks 0, 1, 2: \['logits'\]\[0\]\[1\]: float32 \(4, 3\), at {where}\n"
        rf"  rank {world.size - 1}: \['logits'\]\[0\]\[1\]: float32 \(5, 3\), at {where}\n"
        r"Bring tensors to one size with pad_across_processes\(\) first",
        str(error),
    ), error
    assert len(error.calls) == world.size
    _caught(lambda: world.gather(torch.ones(100_000 + last)))  # too large to travel within the call
    _caught(lambda: world.broadcast_tensors(torch.ones(2 + last)))
    _caught(lambda: world.broadcast_tensors(torch.ones(2), source=int(last)))


def _dtypes(world: Ranks, last: bool) -> None:
    error = _caught(lambda: world.reduce(torch.ones(2, dtype=torch.int64 if last else None), "mean"))
    assert "its argument: int64 (2,)" in str(error)
    assert "its argument: float32 (2,)" in str(error)
    _caught(lambda: world.reduce(torch.ones(2), "sum" if last else "mean"))


def _structure(world: Ranks, last: bool) -> None:
    error = _caught(lambda: world.gather([torch.ones(1)] * (3 if last else 2)))
    assert "[2]: float32 (1,)" in str(error)
    assert "nothing beyond that" in str(error)


def _different_calls(world: Ranks, last: bool) -> None:
    calls: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: world.gather(torch.ones(2)), lambda: world.reduce(torch.ones(2), "sum")),
        (lambda: world.gather(torch.ones(2)), world.barrier),
        (lambda: world.exchange(1), lambda: world.broadcast(1)),
    ]
    for usual, other in calls:
        error = _caught(other if last else usual)
    assert "ranks called different things" in str(error)
    assert f"rank {world.size - 1}: broadcast of plain data, at {__file__}:" in str(error)
    assert "look for one that only some ranks reach" in str(error)


def _bad_input_on_one_rank(world: Ranks, last: bool) -> None:
    tree = {"loss": [0.5 if last else torch.tensor(0.5)]}
    with pytest.raises(NotTensorError if last else RankFailedError) as caught:
        world.gather(tree)
    assert "['loss'][0] is of type float (0.5)" in str(caught.value)
    assert last is isinstance(caught.value, TypeError)
    with pytest.raises(UsageError if last else RankFailedError, match="tensor of bool, which has no sum"):
        world.reduce(torch.tensor(True) if last else torch.tensor(1), "sum")
    with pytest.raises(NotTensorError, match=r"layout torch\.sparse_coo"):
        world.gather(torch.ones(2).to_sparse())
    with pytest.raises(UsageError, match=rf"from_process is 9; allowed: 0 to {world.size - 1}"):
        world.broadcast_tensors(torch.ones(2), source=9)


def _a_block_that_fails(world: Ranks, last: bool) -> None:
    if last:
        world.barrier("main_process_first", failure=KeyError("disk"))
        return
    with pytest.raises(
        RankFailedError, match=rf"rank {world.size - 1} failed at .*: KeyError: 'disk'"
    ) as caught:
        world.barrier("main_process_first")
    assert caught.value.rank == world.size - 1


def test_calls_that_differ_are_told_at_once() -> None:
    run_ranks(Path(__file__), "disagree", 4)


# --------------------------------------------------------------------------------------- missing ranks


def stay_away(_: str, rank: int, size: int) -> None:
    world = Ranks(timeout_s=3)
    world.reduce(torch.ones(2), "sum")
    if rank == 1:
        _busy_elsewhere(8)
    try:
        world.gather(torch.ones(2))
    except RankMissingError as error:
        print(f"RANKS {error.ranks} MESSAGE {error}", flush=True)
    with pytest.raises(RankMissingError, match="the ranks have lost each other before"):
        world.barrier()


def _busy_elsewhere(seconds: float) -> None:
    time.sleep(seconds)


def test_a_rank_that_does_not_come_is_named_with_its_place() -> None:
    outputs = run_ranks(Path(__file__), "stay_away", 3)
    for output in outputs:
        assert "RANKS (1,)" in output
        assert "rank 1 did not come within 3 s. Rank 1 is at" in output
        assert f"{__file__}:" in output
        assert "in _busy_elsewhere" in output
        assert "What all ranks last did together: reduce (call 1)" in output
    assert "given up by rank" in outputs[1]


def die(_: str, rank: int, size: int) -> None:
    world = Ranks(timeout_s=60)
    world.barrier()
    print("READY", flush=True)
    if rank == 2:
        time.sleep(60)
    if rank == 1:
        _busy_elsewhere(3)  # alive, only late
    began = time.monotonic()
    with pytest.raises(RankMissingError) as caught:
        world.gather(torch.ones(2))
    assert time.monotonic() - began < 20
    print(f"RANKS {caught.value.ranks} MESSAGE {caught.value}", flush=True)


def test_a_rank_that_dies_is_told_from_one_that_is_late() -> None:
    ranks = RankProcesses(Path(__file__), "die", 3)
    try:
        first = ranks.processes[2].stdout
        assert first is not None
        assert first.readline() == "READY\n"
        ranks.send(2, signal.SIGKILL)
        outputs = ranks.outputs([0, 1])
    finally:
        ranks.kill()
    for output in outputs:
        assert "RANKS (2,)" in output, outputs
        assert "rank 2 ended, or can't be reached any more" in output
        assert "No answer from rank 2" in output
