"""Saves that meet: several threads, several stores of one path, forks, interruptions."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.forked import begin_fork, end_of_fork, in_fork

from keepstep import Retention, Store
from keepstep.checkpoint.pending import report_unseen_failures
from keepstep.checkpoint.saving.save import Held
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, TensorBytes
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.errors import BackgroundSaveError, StoreBusyError, StoreError
from keepstep.files import PAGE_BYTES, LocalFiles, SegmentFile

PATIENCE_S = 60


class Gate(LocalFiles):
    """Holds every commit up until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        if path.name == "manifest.json":
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)
        super().write_file(path, data, durable=durable)


class Refusing(LocalFiles):
    def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        raise OSError(5, "disk on fire")


def steps(store: Store) -> list[int | None]:
    return [checkpoint.step for checkpoint in store.list()]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def in_child(work: Callable[[], object]) -> int:
    """Fork, run `work` and keepstep's part of leaving a program; the exit code."""

    def work_and_leave() -> None:
        work()
        report_unseen_failures()

    return in_fork(work_and_leave, PATIENCE_S)


def test_a_wait_that_is_interrupted_leaves_the_save_in_flight(tmp_path: Path) -> None:
    gate = Gate()
    store = Store(tmp_path, files=gate)
    store.save_in_background({"x": 1}, step=1)
    assert gate.reached.wait(PATIENCE_S)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)  # SIGINT itself may be ignored
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            store.wait()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert store.busy
    gate.opened.set()
    store.save({"x": 2}, step=2)
    assert steps(store) == [1, 2]


def test_two_threads_that_wait_both_wait(tmp_path: Path) -> None:
    gate = Gate()
    store = Store(tmp_path, files=gate)
    store.save_in_background({"x": 1})
    waiting = [threading.Thread(target=store.wait) for _ in range(2)]
    for thread in waiting:
        thread.start()
        time.sleep(0.05)
    assert all(thread.is_alive() for thread in waiting)
    gate.opened.set()
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert not store.busy


def test_two_stores_of_one_path_take_different_numbers(tmp_path: Path) -> None:
    gate = Gate()
    one, other = Store(tmp_path, files=gate), Store(tmp_path)
    pending = one.save_in_background({"x": 1}, step=1)
    assert gate.reached.wait(PATIENCE_S)
    other.save({"x": 2}, step=2)
    gate.opened.set()
    pending.wait()
    assert sorted(step or 0 for step in steps(one)) == [1, 2]


def test_stores_that_begin_at_once_do_not_sweep_each_other(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def save(step: int) -> None:
        try:
            Store(tmp_path).save({"x": torch.ones(10)}, step=step)
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=save, args=(step,)) for step in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert sorted(step or 0 for step in steps(Store(tmp_path))) == list(range(8))


def test_a_checkpoint_of_a_store_is_never_replaced(tmp_path: Path) -> None:
    """As two processes would meet on a file system without locks."""
    gate = Gate()
    store = Store(tmp_path / "a", files=gate)
    pending = store.save_in_background({"x": 1}, step=1)
    assert gate.reached.wait(PATIENCE_S)
    theirs = Store(tmp_path / "b").save({"x": 2}, step=2)
    theirs.path.rename(tmp_path / "a" / "checkpoint_0")
    gate.opened.set()
    with pytest.raises(BackgroundSaveError) as caught:
        pending.wait()
    assert isinstance(caught.value.__cause__, StoreError)
    assert steps(store) == [2]


def test_a_forked_child_leaves_while_its_parent_saves(tmp_path: Path) -> None:
    gate = Gate()
    store = Store(tmp_path, files=gate)
    store.save_in_background({"x": 1}, step=1)
    assert gate.reached.wait(PATIENCE_S)
    assert in_child(store.wait) == 0
    gate.opened.set()
    store.wait()
    assert steps(store) == [1]


def test_a_forked_child_may_not_write_to_its_parents_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"x": torch.ones(3)})

    def save() -> None:
        with pytest.raises(StoreBusyError):
            store.save({"x": torch.ones(3)})

    assert in_child(save) == 0
    assert len(store.list()) == 1


def test_a_forked_child_may_write_to_a_store_of_its_own(tmp_path: Path) -> None:
    mine, childs = Store(tmp_path / "mine"), Store(tmp_path / "childs")
    mine.save({"x": torch.ones(3)})
    assert in_child(lambda: childs.save({"x": torch.ones(3)}, step=4)) == 0
    assert steps(childs) == [4]


def test_a_failure_is_told_though_the_store_was_dropped(tmp_path: Path) -> None:
    program = (
        "import gc, sys; from keepstep import Store; import tests.checkpoint.test_concurrent_saves as t\n"
        f"Store({str(tmp_path)!r}, files=t.Refusing()).save_in_background({{'x': 1}})\n"
        "import time; time.sleep(0.3); gc.collect()"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert "disk on fire" in done.stderr


def test_dropped_stores_leave_no_threads_and_descriptors(tmp_path: Path) -> None:
    def use(name: str) -> None:
        Store(tmp_path / name).save_in_background({"x": torch.ones(3)}).wait()

    def threads_of_ours() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("keepstep")} - before

    before: set[threading.Thread] = set(threading.enumerate())  # stores of other tests may be alive
    use("first")
    gc.collect()
    descriptors = open_files()
    for _ in range(20):
        use("first")
    gc.collect()
    assert open_files() <= descriptors
    deadline = time.monotonic() + PATIENCE_S
    while threads_of_ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads_of_ours()


def test_failures_while_staging_cost_no_memory_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two blocks in all, a third failure would wait for ever if each kept one."""
    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)

    def refuse(*_: object) -> None:
        raise RuntimeError("the device fell off the bus")

    with monkeypatch.context() as patch:
        patch.setattr("keepstep.checkpoint.saving.staging.TensorBytes.copy_into", refuse)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="bus"):
                store.save_in_background({"x": torch.ones(3)})
    assert store.save({"x": torch.ones(BLOCK_BYTES)}).verify().sound


def test_threads_that_meet_a_refused_direct_write_all_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems take O_DIRECT at open and refuse it at write, in two threads at once."""
    real, both = os.pwrite, threading.Barrier(2)
    refused = threading.local()

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if not getattr(refused, "once", False):
            refused.once = True
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(PATIENCE_S)
            raise OSError(22, "Invalid argument")
        return real(fd, data, offset)

    segment: SegmentFile = LocalFiles().create_segment(tmp_path / "segment", 2 * PAGE_BYTES)
    if not getattr(segment, "_direct", False):
        pytest.skip("this file system knows no direct writes")
    monkeypatch.setattr(os, "pwrite", pwrite)
    failures: list[BaseException] = []

    def write(offset: int) -> None:
        try:
            segment.write_at(memoryview(bytes(PAGE_BYTES)), offset)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(offset,)) for offset in (0, PAGE_BYTES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    segment.finish()
    assert not failures


def test_everything_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    from keepstep import Retention

    store = Store(tmp_path, retention=Retention(keep_last=2))
    store.save({"x": torch.zeros(100)})
    stop, failures = threading.Event(), []

    def over_and_over(work: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                work()
        except Exception as error:  # noqa: BLE001
            failures.append(error)

    jobs: list[Callable[[], object]] = [
        lambda: store.save_in_background({"x": torch.ones(100)}),
        lambda: store.save({"x": torch.ones(100)}),
        store.wait,
        store.list,
        lambda: store.latest() or pytest.fail("there is always one"),
        lambda: store.load_latest_into({"x": torch.zeros(100)}),
        store.prune,
    ]
    threads = [threading.Thread(target=over_and_over, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    time.sleep(2)
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not failures
    assert not caplog.records


def test_a_fork_does_not_wait_for_its_parents_save(tmp_path: Path) -> None:
    gate = Gate()
    pending = Store(tmp_path, files=gate).save_in_background({"x": torch.ones(3)}, staging="overlapped")

    def work() -> None:
        pending.wait_staged()
        assert pending.done()
        assert pending.inherited
        with pytest.raises(BackgroundSaveError, match=rf"begun by process {os.getppid()}.*finished there"):
            pending.wait()

    try:
        assert in_child(work) == 0
    finally:
        gate.opened.set()
    assert not pending.inherited
    assert pending.wait().name == "checkpoint_0"


def test_a_checkpoint_is_deletable_though_a_child_was_forked_while_it_was_saved(tmp_path: Path) -> None:
    """Workers that load data may live as long as the run."""
    gate = Gate()
    store = Store(tmp_path, files=gate, retention=Retention(keep_last=1))
    pending = store.save_in_background({"x": torch.ones(3)}, step=1)
    assert gate.reached.wait(PATIENCE_S)
    may_end = multiprocessing.get_context("fork").Event()
    worker = begin_fork(lambda: may_end.wait(PATIENCE_S))
    gate.opened.set()
    try:
        pending.wait()
        store.save({"x": torch.ones(3)}, step=2)
        assert steps(store) == [2]
    finally:
        may_end.set()
        end_of_fork(worker)


@pytest.mark.timeout(30)
def test_the_handler_of_a_signal_saves_while_a_state_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With less memory than the state: what is copied has to be written before more is."""
    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)
    copy_into, copies = TensorBytes.copy_into, itertools.count()

    def slow_copy(*args: Any) -> None:
        if next(copies) == 5:
            time.sleep(0.1)  # others take what memory there is
            os.kill(os.getpid(), signal.SIGUSR1)
        copy_into(*args)

    def save_at_once(*_: object) -> None:
        store.save({"w": torch.ones(1 << 20)}, step=2)

    monkeypatch.setattr(TensorBytes, "copy_into", slow_copy)
    before = signal.signal(signal.SIGUSR1, save_at_once)
    try:
        store.save_in_background({"w": torch.arange(10 * BLOCK_BYTES // 4, dtype=torch.int32)}, step=1).wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(steps(store), key=str) == [1, 2]
    assert all(report.sound for report in store.verify())


@pytest.mark.timeout(30)
def test_the_handler_of_a_signal_saves_while_the_store_is_claimed(tmp_path: Path) -> None:
    class Signalling(LocalFiles):
        def make_directory(self, path: Path) -> None:
            super().make_directory(path)
            if path.name == ".keepstep" and not store.list():
                signal.raise_signal(signal.SIGUSR1)

    def save_at_once(*_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        store.save({"w": torch.ones(3)}, step=2)

    store = Store(tmp_path, files=Signalling())
    before = signal.signal(signal.SIGUSR1, save_at_once)
    try:
        store.save({"w": torch.ones(3)}, step=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert steps(store) == [2, 1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("amid", ["sealing", "comparing"])
def test_the_handler_of_a_signal_saves_amid_what_only_one_thread_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amid: str
) -> None:
    store, state = Store(tmp_path), {"w": [torch.rand(1 << 19) for _ in range(6)]}
    for _ in range(3):
        store.save(state, step=1)

    def save_at_once(*_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        store.save(state, step=2)

    def signalling(held: Any, *args: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return real(held, *args)

    if amid == "sealing":
        real = Held._writes
        pending = store.save_in_background(state, step=1, staging="overlapped")
        monkeypatch.setattr(Held, "_writes", signalling)
    else:
        real = KnownDigests._proved_digest
        monkeypatch.setattr(KnownDigests, "_proved_digest", signalling)
    before = signal.signal(signal.SIGUSR1, save_at_once)
    try:
        if amid == "sealing":
            pending.wait_staged()
        else:
            store.save(state, step=1)
        store.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert sorted(map(str, steps(store))) == ["1", "1", "1", "1", "2"]
    assert all(report.sound for report in store.verify())
