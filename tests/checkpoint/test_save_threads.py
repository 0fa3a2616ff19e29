"""The threads of a save end with it, whatever happens; a process that is left with one never exits."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from tests.checkpoint.equality import assert_same
from tests.checkpoint.test_tracking import kernel_can
from torch.distributed.checkpoint.api import CheckpointException

import keepstep
from keepstep import Checkpoint
from keepstep.checkpoint import in_flight
from keepstep.checkpoint.crew import Crew
from keepstep.checkpoint.format.manifest import digest_of
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, TensorBytes
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.checkpoint.saving.unchanged import Comparison
from keepstep.checkpoint.store import Store

_OF_A_SAVE = ("keepstep-write", "keepstep-commit", "keepstep-compare")


def threads_left() -> list[str]:
    for thread in threading.enumerate():
        if thread.name.startswith(_OF_A_SAVE):
            thread.join(5)
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(_OF_A_SAVE)]


@pytest.mark.parametrize("refused", [1, 2, 3, 4])
@pytest.mark.parametrize("staging", ["awaited", "overlapped"])
def test_no_thread_is_left_where_the_system_gives_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: Any, refused: int
) -> None:
    store, state = Store(tmp_path), {"w": torch.arange(3.0 * BLOCK_BYTES / 4)}  # work for all threads
    real, started = threading.Thread.start, [0]

    def start(thread: threading.Thread) -> None:
        started[0] += thread.name.startswith("keepstep")
        if started[0] == refused:
            raise RuntimeError("can't start new thread")
        real(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with pytest.raises(Exception, match="can't start new thread"):
            store.save_in_background(state, staging=staging).wait()
    assert not threads_left()
    assert not store.list()
    pool = store._saves._parts.engine.pool
    assert len(pool._free) * BLOCK_BYTES == pool.allocated_bytes
    assert_same(store.save(state).load(), state)


def test_nobody_reads_tensors_any_more_once_their_comparison_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_start, real_matches, started, reading = threading.Thread.start, TensorBytes.matches, [0], set[int]()

    def start(thread: threading.Thread) -> None:
        started[0] += 1
        if started[0] == 2:
            raise RuntimeError("can't start new thread")
        real_start(thread)

    def matches(source: TensorBytes, *args: Any) -> bool:
        reading.add(threading.get_ident())
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
        try:
            return real_matches(source, *args)
        finally:
            reading.discard(threading.get_ident())

    tensors = [torch.full((4,), float(n)) for n in range(9)]
    digests = [digest_of(t.numpy().tobytes()) for t in tensors]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        patched.setattr(TensorBytes, "matches", matches)
        with pytest.raises(RuntimeError, match="new thread"):
            Comparison([TensorBytes(t) for t in tensors], digests, KnownDigests()).ends_alike()
        assert not reading


def test_a_failed_copy_keeps_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is never given back is missing for good; without any, a save waits for ever."""
    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)
    w = torch.zeros(6 * BLOCK_BYTES // 4)
    real, first, copied = TensorBytes.copy_into, dict[str, threading.Thread](), [0]

    def copy_into(source: TensorBytes, *args: Any) -> None:
        this = threading.current_thread()
        if first.setdefault("thread", this) is this:
            copied[0] += 1
            if copied[0] == 2:
                time.sleep(0.05)
                raise MemoryError("no memory to make a tensor dense")
        else:
            time.sleep(0.1)  # it still copies when the other one fails
        real(source, *args)

    monkeypatch.setattr(TensorBytes, "copy_into", copy_into)
    for _ in range(2):
        first.clear()
        copied[0] = 0
        with pytest.raises(MemoryError):
            store.save_in_background({"w": w})
    pool = store._saves._parts.engine.pool
    assert len(pool._free) * BLOCK_BYTES == pool.allocated_bytes


@pytest.mark.parametrize("staging", ["awaited", "overlapped"])
def test_ctrl_c_just_after_the_work_was_handed_in_harms_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, staging: Any
) -> None:
    store, state = Store(tmp_path), {"w": torch.arange(1000.0)}

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(in_flight, "PendingSave", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save_in_background(state, staging=staging)
    assert not threads_left()
    (committed,) = store.list()
    assert committed.verify().sound
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_0"]
    assert_same(store.save(state).load(), state)


def test_ctrl_c_just_after_a_writer_was_started_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is closed then, and the number of an open file may be another one's a moment later."""
    store, state = Store(tmp_path), {"w": torch.arange(1000.0)}
    real_submit, real_write, writing = Crew.submit, os.pwrite, threading.Event()

    def submit(crew: Crew, work: Any) -> Any:
        real_submit(crew, work)
        writing.wait(10)
        raise KeyboardInterrupt

    def slowly(*args: Any) -> int:
        if threading.current_thread().name.startswith(_OF_A_SAVE):
            writing.set()
            time.sleep(0.3)
        return real_write(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Crew, "submit", submit)
        patched.setattr(os, "pwrite", slowly)
        with pytest.raises(KeyboardInterrupt):
            store.save(state)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith(_OF_A_SAVE)]
    assert_same(store.save(state).load(), state)


def test_dcp_save_that_is_interrupted_while_it_compares_leaves_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is being written by then."""
    state = {"base": {"w": torch.rand(1 << 20)}, "adapter": {"a": torch.zeros(1024)}}

    def save(step: int) -> None:
        state["adapter"]["a"] += 1
        writer = keepstep.dcp.StorageWriter(tmp_path / f"step_{step}", step=step)
        torch_dcp.save(state, storage_writer=writer, no_dist=True)

    def interrupted(_: Comparison) -> bool:
        raise KeyboardInterrupt

    save(1)
    with monkeypatch.context() as patched:
        patched.setattr(Comparison, "ends_alike", interrupted)
        with pytest.raises((KeyboardInterrupt, CheckpointException)):
            save(2)
    assert not threads_left()
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    save(3)
    assert_same(Checkpoint.open(tmp_path / "step_3").load(), state)


def test_a_small_save_starts_no_more_threads_than_have_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name != "keepstep-sync":  # one a file, which the disk works on meanwhile
            started.append(thread.name)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    store, base, adapter = Store(tmp_path), torch.rand(8, 1 << 18), torch.rand(64)
    for _ in range(6):
        adapter.add_(1)
        started.clear()
        store.save({"adapter": adapter, "base": list(base.unbind())})
    helping = [name for name in started if name.startswith("keepstep-compare")]
    assert bool(helping) is not kernel_can(), "the base is read, with help, unless its writes are tracked"
    (writer,) = [name for name in started if name not in helping]
    assert writer.startswith("keepstep-write")
