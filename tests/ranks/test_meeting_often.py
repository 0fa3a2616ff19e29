"""Ranks that save to many places, or are called upon by a signal's handler while they meet."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.ranks.spawn import run_ranks

from keepstep import Checkpoint, save_directory
from keepstep.checkpoint.one_for_all import by_rank_0
from keepstep.errors import NoThreadError, RankError, RankFailedError, UsageError
from keepstep.world import Ranks


def together(folder: str, rank: int, _: int) -> None:
    root, world = Path(folder), Ranks(timeout_s=30)
    _many_directories_take_no_more_than_one(root, world)
    _places_of_its_own_are_refused(root, rank, world)
    _a_handler_is_refused(rank, world)
    _an_interrupted_rank_is_not_waited_for(0, rank, world)
    _an_interrupted_rank_is_not_waited_for(1, rank, world)
    _rank_0_tells_that_it_gets_no_thread(rank, world)


def _held() -> tuple[int, int]:
    threads = [thread for thread in threading.enumerate() if thread.name == "keepstep-meet"]
    return len(threads), len(list(Path("/proc/self/fd").iterdir()))


def _many_directories_take_no_more_than_one(root: Path, world: Ranks) -> None:
    held = []
    for number in range(6):
        save_directory(root / f"step_{number}", {"w": torch.full((3,), number)}, step=number, world=world)
        world.barrier()
        held.append(_held())
    assert held[1] == held[-1], held
    assert Checkpoint.open(root / "step_5").load()["w"].tolist() == [5, 5, 5]


def _places_of_its_own_are_refused(root: Path, rank: int, world: Ranks) -> None:
    with pytest.raises(RankError, match=r"rank 1 saves to .*own_1, rank 0 to .*own_0"):
        save_directory(root / f"own_{rank}", {"w": 1}, world=world)
    assert not list(root.glob("own_*"))


def _a_handler_is_refused(rank: int, world: Ranks) -> None:
    """It would wait for what its own thread is in the middle of."""
    refused: list[str] = []

    def handler(*_: object) -> None:
        try:
            world.barrier("save_state()")
        except UsageError as error:
            refused.append(str(error))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3 if rank == 0 else 0)
    time.sleep(0.8 if rank else 0)
    world.barrier()
    signal.signal(signal.SIGALRM, before)
    assert len(refused) == (rank == 0)
    assert all(said.startswith("save_state(): it was called in the middle") for said in refused)
    world.barrier()


def _an_interrupted_rank_is_not_waited_for(which: int, rank: int, world: Ranks) -> None:
    """Rank 0's work goes on on a thread; what interrupts a rank's wait for it ends the others' as well."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    world.barrier()
    began_s = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 1 if rank == which else 0)
    with pytest.raises(KeyboardInterrupt if rank == which else RankFailedError):
        by_rank_0(world, "pulling", lambda: time.sleep(20))
    assert time.monotonic() - began_s < 10
    signal.signal(signal.SIGALRM, before)


def _rank_0_tells_that_it_gets_no_thread(rank: int, world: Ranks) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("keepstep-rank-0"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with contextlib.ExitStack() as patched:
        if rank == 0:
            threading.Thread.start = refuse  # type: ignore[method-assign]
            patched.callback(setattr, threading.Thread, "start", start)
        began_s = time.monotonic()
        with pytest.raises(RankFailedError if rank else NoThreadError, match="can't start new thread"):
            by_rank_0(world, "without a thread", lambda: None)
    assert time.monotonic() - began_s < 10


def test_two_ranks(tmp_path: Path) -> None:
    run_ranks(__file__, "together", 2, tmp_path)
