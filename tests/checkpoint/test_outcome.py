"""Waiting for another thread may be interrupted at any instant; see `keepstep.checkpoint.outcome`."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from keepstep.checkpoint.outcome import Latch, Outcome, wait_for_all
from keepstep.checkpoint.saving.crew import Crew
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, BlockPool


def interrupted_at(instruction: int, work: Callable[[], object]) -> bool:
    """Do the work; raise KeyboardInterrupt before that many instructions of it. Whether it got that far."""
    left = itertools.count(instruction, -1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode" and next(left) == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


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
    "block": lambda crew, outcome, latch: no_block_left().acquire(threading.Event()),
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


@pytest.mark.skipif(sys.gettrace() is not None, reason="another tracer is at work")
def test_a_wait_interrupted_at_any_instruction_holds_up_nobody() -> None:
    for instruction in itertools.count():
        outcome: Outcome[int] = Outcome()
        opening = Latch()
        worker = threading.Thread(target=settle_behind, args=(opening, outcome), daemon=True)
        worker.start()
        first = opened_after(opening, 0.0 if instruction % 2 else 0.01)
        interrupted = interrupted_at(instruction, outcome.result)
        first.join(10)
        worker.join(10)
        assert not worker.is_alive(), f"interrupted at instruction {instruction}, the work never ends"
        assert outcome.result() == 3
        if not interrupted:
            assert instruction > 10
            return
