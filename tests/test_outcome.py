"""Waiting for another thread may be interrupted at any instant; see `keepstep.outcome`."""

from __future__ import annotations

import dis
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import pytest
import torch.distributed as dist

from keepstep.checkpoint.crew import Crew
from keepstep.checkpoint.keeping.scrub import Scrubber
from keepstep.checkpoint.place.bucket_writing import _LargeSegment
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, BlockPool
from keepstep.errors import RankMissingError
from keepstep.keystore import Connection
from keepstep.outcome import Latch, Outcome, wait_for_all


def interrupted_at(instant: int, work: Callable[[], object]) -> bool:
    """Do the work; raise KeyboardInterrupt at that many of the instants at which Python hears signals.

    These are the begin of a function, the instruction after a call, and the end of a turn of a loop.

    Returns:
        Whether it got that far.
    """
    left = itertools.count(instant, -1)
    reached = False

    def trace(frame: FrameType, _: str, __: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        last = "RESUME"

        def step(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last, reached
            if event == "opcode":
                before, last = last, dis.opname[frame.f_code.co_code[frame.f_lasti]]
                hears = before.startswith(("RESUME", "CALL")) or "JUMP_BACKWARD" in last
                if hears and next(left) == 0:
                    reached = True
                    raise KeyboardInterrupt
            return step

        return step

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:  # not suppressed by code that would be traced too
        pass
    finally:
        sys.settrace(before)
    return reached


def ends(work: Callable[[], object]) -> bool:
    """Whether the work ends."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()


def opened_after(latch: Latch, delay_s: float) -> threading.Thread:
    thread = threading.Thread(target=lambda: (time.sleep(delay_s), latch.open()), daemon=True)
    thread.start()
    return thread


def settle_behind(latch: Latch, outcome: Outcome[int]) -> None:
    latch.wait()
    outcome.settle(lambda: 3)


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(1, "test")
    yield crew
    crew.close()
    crew.wait()


def test_a_wait_with_a_limit_ends() -> None:
    outcome: Outcome[int] = Outcome()
    for limit_s in (-1.0, 0.0, 0.01):
        assert not outcome.wait(limit_s)
    outcome.settle(lambda: 1)
    assert outcome.wait(0.0)


def test_results_and_errors_come_to_all_who_wait(crew: Crew) -> None:
    def fail() -> None:
        raise KeyError("why")

    held = threading.Event()
    first, second = crew.submit(lambda: held.wait(10)), crew.submit(fail)
    assert not first.done()
    got: list[object] = []
    waiting = [threading.Thread(target=lambda: got.append(first.result())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    held.set()
    for thread in waiting:
        thread.join()
    assert got == [True] * 3
    wait_for_all([first, second])
    assert second.done()
    assert first.error() is None
    for _ in range(2):
        with pytest.raises(KeyError, match="why"):
            second.result()


@pytest.mark.parametrize("told", ["before", "after"])
def test_an_error_is_noted_before_any_wait_is_over(told: str) -> None:
    outcome: Outcome[int] = Outcome()
    noted: list[BaseException | None] = []
    if told == "after":
        outcome.settle(lambda: 1 // 0)
    outcome.before_it_is_told(noted.append)
    if told == "before":
        outcome.settle(lambda: 1 // 0)
    assert isinstance(noted[0], ZeroDivisionError)
    assert outcome.error() is noted[0]


WAITS: dict[str, Callable[[Crew, Outcome[None], Latch], object]] = {
    "latch": lambda crew, outcome, latch: latch.wait(),
    "result": lambda crew, outcome, latch: outcome.result(),
    "all": lambda crew, outcome, latch: wait_for_all([outcome]),
    "crew": lambda crew, outcome, latch: crew.wait(),
    "block": lambda crew, outcome, latch: no_block_left().acquire(Latch()),
}


def no_block_left() -> BlockPool:
    pool = BlockPool(2 * BLOCK_BYTES)
    pool._most = 0
    return pool


@pytest.mark.parametrize("wait", WAITS)
def test_a_signal_that_wakes_nobody_is_heard(crew: Crew, wait: str) -> None:
    """Another thread takes it; so does one that comes just before the main thread falls asleep go by."""
    ended, latch = threading.Event(), Latch()
    outcome = crew.submit(lambda: (ended.wait(30), latch.open())[1])
    crew.close()
    threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            WAITS[wait](crew, outcome, latch)
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
    assert time.monotonic() - began < 20
    outcome.result()


def at_any_instant(test: Callable[..., None]) -> Callable[..., None]:
    """A test that interrupts; in a callback of the garbage collector Python only reports that."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.skipif(sys.gettrace() is not None, reason="another tracer is at work")(ignored(test))


@at_any_instant
def test_a_wait_interrupted_at_any_instant_holds_up_nobody() -> None:
    for instant in itertools.count():
        outcome: Outcome[int] = Outcome()
        opening = Latch()
        worker = threading.Thread(target=settle_behind, args=(opening, outcome), daemon=True)
        worker.start()
        first = opened_after(opening, 0.0 if instant % 2 else 0.01)
        interrupted = interrupted_at(instant, outcome.result)
        first.join(10)
        worker.join(10)
        assert not worker.is_alive(), f"interrupted at instant {instant}, the work never ends"
        assert outcome.result() == 3
        if not interrupted:
            assert instant > 3
            return


@at_any_instant
def test_a_question_to_the_ranks_store_interrupted_at_any_instant_leaves_it_open_to_the_next() -> None:
    for instant in itertools.count():
        store = Connection(dist.HashStore(), "test")
        store.set("key", "value")
        interrupted = interrupted_at(instant, lambda store=store: store.get("key"))
        assert ends(lambda store=store: until_answered(store)), f"at instant {instant}"
        if not interrupted:
            assert instant > 3
            return


def until_answered(store: Connection) -> None:
    while True:
        try:
            assert store.get("key") == b"value"
        except RankMissingError:  # the one before may be under way
            time.sleep(0.01)
        else:
            return


class SlowBucket:
    """Takes parts and keeps each for a while."""

    def upload(self, key: str, parts: Iterator[memoryview]) -> None:
        for part in parts:
            time.sleep(0.001)
            del part


@at_any_instant
def test_an_upload_interrupted_at_any_instant_can_be_given_up() -> None:
    data = memoryview(bytes(8))
    for instant in itertools.count():
        segment = _LargeSegment(cast(Any, SlowBucket()), "key", 16)
        interrupted = interrupted_at(instant, lambda segment=segment: segment.write_at(data, 0))
        assert ends(segment.abandon), f"interrupted at instant {instant}, the upload never ends"
        if not interrupted:
            assert instant > 3
            return


@at_any_instant
def test_a_scrub_whose_stop_was_interrupted_at_any_instant_can_be_stopped(tmp_path: Path) -> None:
    def forget(*_: object) -> None:
        pass

    for instant in itertools.count():
        scrub = Scrubber(tmp_path, interval_s=60, bytes_per_s=1, found=forget)
        scrub.start()
        interrupted = interrupted_at(instant, scrub.stop)
        assert ends(scrub.stop), f"interrupted at instant {instant}, the scrub never stops"
        if not interrupted:
            assert instant > 3
            return
