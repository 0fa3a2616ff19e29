"""What a thread was in the middle of is over once its code has gone on, and not before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from keepstep.checkpoint.saving.under_way import UnderWay


class Walker:
    """A thread that goes on to its next stop when it is told to, and says when it stands there."""

    def __init__(self, walk: Callable[[Callable[[], None]], object]) -> None:
        self._go = threading.Semaphore(0)
        self._there = threading.Semaphore(0)
        self.thread = threading.Thread(target=walk, args=(self._stop,))
        self.thread.start()
        assert self._there.acquire(timeout=60)

    def _stop(self) -> None:
        self._there.release()
        assert self._go.acquire(timeout=60)

    def go_on(self) -> None:
        self._go.release()
        assert self._there.acquire(timeout=60)

    def end(self) -> None:
        for _ in range(10):
            self._go.release()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def walk() -> Iterator[Callable[[Callable[..., object]], Walker]]:
    walkers: list[Walker] = []

    def start(along: Callable[..., object]) -> Walker:
        walkers.append(Walker(along))
        return walkers[-1]

    yield start
    for walker in walkers:
        walker.end()


def run_by(module: str, call: Callable[[], None], name: str = "run") -> Callable[[], None]:
    """A function of this name and module that calls `call` twice."""
    scope: dict[str, Any] = {"__name__": module, "call": call}
    exec(f"def {name}():\n    call()\n    call()\n", scope)
    function: Callable[[], None] = scope[name]
    return function


def test_it_goes_on_while_the_thread_stands_still(walk: Any) -> None:
    walker = walk(lambda stop: (stop(), stop()))
    under_way = UnderWay(walker.thread)
    assert not under_way.is_over
    assert not under_way.is_over
    walker.go_on()
    assert under_way.is_over


def test_it_is_over_once_the_thread_has_ended(walk: Any) -> None:
    walker = walk(lambda stop: stop())
    under_way = UnderWay(walker.thread)
    walker.end()
    assert under_way.is_over
    assert UnderWay(walker.thread).is_over


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._dynamo.eval_frame", "compile_wrapper"),
        ("torch.utils._python_dispatch", "run"),
        ("of_a_user", "__torch_dispatch__"),
    ],
)
def test_an_operation_that_is_python_within_is_over_when_its_caller_goes_on(
    walk: Any, module: str, name: str
) -> None:
    walker = walk(lambda stop: (run_by(module, run_by("of_a_user", stop), name)(), stop()))
    under_way = UnderWay(walker.thread)
    for _ in range(3):
        walker.go_on()
        assert not under_way.is_over
    walker.go_on()
    assert under_way.is_over


def test_what_runs_a_training_loop_is_no_operation(walk: Any) -> None:
    walker = walk(lambda stop: run_by("torch.multiprocessing.spawn", run_by("of_a_user", stop))())
    under_way = UnderWay(walker.thread)
    walker.go_on()
    assert under_way.is_over
