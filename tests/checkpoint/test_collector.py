from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

import pytest
from tests.forked import in_fork

from keepstep.checkpoint.collector import collector_paused


@contextlib.contextmanager
def paused_by_another_thread() -> Iterator[None]:
    """It has paused the collector when the block begins, and is out when the block has ended."""
    inside, leave = threading.Event(), threading.Event()

    def pause() -> None:
        with collector_paused():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=pause)
    thread.start()
    try:
        assert inside.wait(10)
        yield
    finally:
        leave.set()
        thread.join(10)


def test_the_collector_pauses_and_goes_on_however_the_block_ends() -> None:
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()


def test_it_goes_on_when_the_last_thread_is_out() -> None:
    with contextlib.ExitStack() as other:
        with collector_paused():
            other.enter_context(paused_by_another_thread())
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_user_who_turned_it_off_keeps_it_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_child_that_is_forked_meanwhile_collects_its_garbage() -> None:
    def collects_unless_it_pauses() -> None:
        assert gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert gc.isenabled()

    with paused_by_another_thread():
        assert in_fork(collects_unless_it_pauses) == 0
