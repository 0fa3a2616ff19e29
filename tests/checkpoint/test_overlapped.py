"""Copying behind the caller's back: what may change meanwhile, and what is found out if it did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.holding import Held
from torch.utils._python_dispatch import TorchDispatchMode

from keepstep.checkpoint.pending import PendingSave
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, TensorBytes
from keepstep.checkpoint.store import Store
from keepstep.errors import BackgroundSaveError, StateChangedError, StillSavingError, UsageError


@pytest.fixture
def held(held: Held) -> Held:
    """Closed from the beginning."""
    held.opened.clear()
    return held


def test_the_caller_goes_on_before_anything_is_copied(tmp_path: Path, held: Held) -> None:
    store = Store(tmp_path)
    pending = store.save_in_background({"w": torch.arange(5.0)}, staging="overlapped")
    assert not pending.done()
    held.holds_up(pending.wait_staged)
    assert_same(pending.wait().load(), {"w": torch.arange(5.0)})


def test_a_state_may_change_once_it_is_staged(tmp_path: Path) -> None:
    """Even while it is still being written: three times the blocks that there are."""
    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)
    w = torch.arange(6 * BLOCK_BYTES // 4, dtype=torch.int32)
    expected = w.clone()
    pending = store.save_in_background({"w": w}, staging="overlapped")
    pending.wait_staged()
    w.zero_()
    assert torch.equal(pending.wait().load()["w"], expected)


WRITES = {
    "in place": lambda w: w.add_(1),
    "through a view": lambda w: w.view(-1)[3:5].zero_(),
    "by index": lambda w: w.__setitem__((0, 0), 7.0),
    "by a raw optimizer": lambda w: torch.optim.SGD([_with_gradient(w)], lr=0.1).step(),
}


def _with_gradient(w: torch.Tensor) -> torch.Tensor:
    w.requires_grad_().grad = torch.ones_like(w)
    return w


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_before_the_copy_is_found_out(tmp_path: Path, held: Held, write: object) -> None:
    store = Store(tmp_path)
    held.opened.set()
    store.save({"a": torch.ones(2)})
    held.opened.clear()
    w = torch.ones(4, 4)
    pending = store.save_in_background({"model": {"w": w, "b": torch.ones(3)}}, staging="overlapped")
    write(w)  # type: ignore[operator]
    held.opened.set()
    with pytest.raises(BackgroundSaveError, match="model/w") as failure:
        pending.wait()
    assert isinstance(failure.value.__cause__, StateChangedError)
    assert failure.value.__cause__.tensors == ("model/w",)
    assert [c.name for c in store.list()] == ["checkpoint_0"], "a torn state was committed"
    assert not list(tmp_path.glob("*.tmp-*"))
    assert_same(store.save({"w": w}).load(), {"w": w.detach()})


def _is_copied(pending: PendingSave) -> bool:
    return "being copied" not in repr(pending)


def _assert_refused(store: Store, pending: PendingSave) -> None:
    with pytest.raises(BackgroundSaveError, match="w/value") as failure:
        pending.wait()
    assert isinstance(failure.value.__cause__, StateChangedError)
    assert store.list() == [], "a torn state was committed"


def test_a_write_that_goes_on_while_everything_is_copied_is_found_out(tmp_path: Path, held: Held) -> None:
    """Torch counts a write when it is done: while it goes on, the copy looks sound."""
    w, store = torch.rand(1 << 20) + 1, Store(tmp_path)
    before = float(w[0])
    pending = store.save_in_background({"w": w}, staging="overlapped")
    copied_at_s: list[float] = []

    def copy_once_it_writes() -> None:
        while float(w[0]) == before:
            time.sleep(0)
        held.opened.set()
        while not _is_copied(pending):
            time.sleep(0.001)
        copied_at_s.append(time.monotonic())

    copying = threading.Thread(target=copy_once_it_writes)
    copying.start()
    w.polygamma_(2)  # hundreds of milliseconds, without the interpreter's lock
    ended_s = time.monotonic()
    copying.join()
    assert copied_at_s[0] < ended_s, "the write did not take long enough"
    _assert_refused(store, pending)


class _HalfAndHalf(TorchDispatchMode):
    """Operations that are Python within torch's: torch counts the write when both halves are done."""

    def __init__(self, w: torch.Tensor, between: Callable[[], object]) -> None:
        super().__init__()
        self._w = w
        self._between = between

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        half = self._w.numel() // 2
        self._w.numpy()[:half] = 7
        self._between()
        self._w.numpy()[half:] = 7
        return args[0]


def test_a_write_by_python_within_torch_is_found_out(tmp_path: Path, held: Held) -> None:
    w, store = torch.ones(1000), Store(tmp_path)
    pending = store.save_in_background({"w": w}, staging="overlapped")

    def let_it_be_copied() -> None:
        held.opened.set()
        ends_s = time.monotonic() + 60
        while not _is_copied(pending) and time.monotonic() < ends_s:
            time.sleep(0.001)
        time.sleep(0.3)  # time enough to commit
        assert store.list() == [], "a torn state was committed"

    with _HalfAndHalf(w, let_it_be_copied):
        w.fill_(7)
    _assert_refused(store, pending)


def _until_committed(store: Store) -> None:
    """Wait without a call that tells keepstep where this thread is."""
    ends_s = time.monotonic() + 20
    while not store.list():
        assert time.monotonic() < ends_s, "it was not committed"


def test_a_save_is_committed_while_the_thread_that_ordered_it_does_something_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_in_background({"w": torch.ones(1000)}, staging="overlapped")
    _until_committed(store)


def test_a_save_is_committed_though_the_thread_that_ordered_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepstep.checkpoint.saving.save._LONGEST_WRITE_S", 0.2)
    store, go_on = Store(tmp_path), threading.Event()

    def order() -> None:
        store.save_in_background({"w": torch.ones(1000)}, staging="overlapped")
        go_on.wait(60)

    ordering = threading.Thread(target=order)
    ordering.start()
    _until_committed(store)
    go_on.set()
    ordering.join()


def test_a_save_is_committed_once_the_thread_that_ordered_it_has_ended(tmp_path: Path, held: Held) -> None:
    store = Store(tmp_path)
    ordering = threading.Thread(
        target=lambda: store.save_in_background({"w": torch.ones(1000)}, staging="overlapped")
    )
    ordering.start()
    ordering.join()
    held.opened.set()
    _until_committed(store)


def test_memory_that_was_given_back_before_the_copy_is_not_read(tmp_path: Path, held: Held) -> None:
    w = torch.ones(1 << 18)
    pending = Store(tmp_path).save_in_background({"w": w}, staging="overlapped")
    w.untyped_storage().resize_(0)
    held.opened.set()
    with pytest.raises(BackgroundSaveError, match="needs 1048576 bytes of memory and has 0"):
        pending.wait()
    assert Store(tmp_path).list() == []


def test_memory_that_was_given_back_before_the_save_is_not_read(tmp_path: Path) -> None:
    store, kept, given_back = Store(tmp_path), torch.rand(1 << 18), torch.rand((1 << 18) + 1)
    store.save({"base": [kept, given_back]})
    given_back.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match="needs 1048580 bytes of memory and has 0"):
        store.save({"base": [kept, given_back]})
    assert len(store.list()) == 1


@pytest.mark.parametrize("view", ["transposed", "conjugated", "expanded", "said to change"])
def test_memory_that_was_given_back_is_not_read_however_it_is_looked_at(tmp_path: Path, view: str) -> None:
    w = torch.ones(300, 300, dtype=torch.complex64)
    seen = {"transposed": w.t(), "conjugated": w.conj(), "expanded": w[:1].expand(400, 300)}.get(view, w)
    w.untyped_storage().resize_(0)
    changing = [seen] if view == "said to change" else []
    with pytest.raises((UsageError, BackgroundSaveError), match="bytes of memory and has 0"):
        Store(tmp_path).save_in_background({"w": seen}, staging="overlapped", changing=changing).wait()
    assert Store(tmp_path).list() == []


def test_what_is_said_to_change_is_copied_at_once(tmp_path: Path, held: Held) -> None:
    model = torch.nn.BatchNorm1d(3)
    state = {"model": model, "gradient": torch.ones(2), "memory": np.arange(4)}
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    pending = Store(tmp_path).save_in_background(
        state, staging="overlapped", changing=[*model.buffers(), state["gradient"]]
    )
    model(torch.randn(8, 3))
    state["gradient"].zero_()
    state["memory"][:] = -1
    held.opened.set()
    loaded = pending.wait().load()
    assert_same(dict(loaded["model"]), expected)
    assert_same(loaded["gradient"], torch.ones(2))
    assert loaded["memory"].tolist() == [0, 1, 2, 3]


def _sparse_gradient() -> torch.Tensor:
    table = torch.nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 3])).sum().backward()
    assert table.weight.grad is not None
    return table.weight.grad


WITHOUT_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": _sparse_gradient,
    "meta": lambda: torch.ones(3, device="meta"),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "lazy": torch.nn.UninitializedBuffer,
}


@pytest.mark.parametrize("make", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY)
def test_what_changes_may_be_of_a_kind_that_no_state_holds(
    tmp_path: Path, held: Held, make: Callable[[], torch.Tensor]
) -> None:
    """A sparse gradient, or a buffer that is not saved; what lies beside it is still found to change."""
    w, statistics, other = torch.ones(3), torch.zeros(3), make()
    state = {"w": w, "statistics": statistics}
    pending = Store(tmp_path).save_in_background(
        state, staging="overlapped", changing=[other, statistics], steady=[other]
    )
    statistics.fill_(7)
    assert not pending.done()
    held.opened.set()
    assert_same(pending.wait().load(), {"w": w, "statistics": torch.zeros(3)})


def test_tensors_without_a_version_are_copied_at_once(tmp_path: Path, held: Held) -> None:
    with torch.inference_mode():
        w = torch.ones(3)
    pending = Store(tmp_path).save_in_background({"w": w}, staging="overlapped")
    with torch.inference_mode():
        w.zero_()
    held.opened.set()
    assert_same(pending.wait().load()["w"], torch.ones(3))


def test_a_failed_copy_lets_the_caller_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory to copy to")

    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)
    with monkeypatch.context() as broken:
        broken.setattr(TensorBytes, "copy_into", fail)
        for _ in range(3):
            pending = store.save_in_background({"w": torch.ones(3)}, staging="overlapped")
            pending.wait_staged()
            with pytest.raises(BackgroundSaveError, match="no memory"):
                pending.wait()
    assert store.save({"w": torch.ones(BLOCK_BYTES)}).verify().sound


def test_small_states_are_copied_at_once_and_large_ones_behind(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepstep.checkpoint.in_flight.AWAITED_UP_TO_BYTES", 100_000)
    large = Store(tmp_path / "large").save_in_background({"w": torch.ones(50_000)}, staging="auto")
    assert not large.done()
    held.opened.set()
    small = Store(tmp_path / "small").save_in_background({"w": torch.ones(10)}, staging="auto")
    small.wait_staged()
    assert small.wait().verify().sound
    assert large.wait().verify().sound


def test_what_changes_is_not_copied_twice_over_if_it_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keepstep.checkpoint.saving.save._HELD_BYTES", 1000)
    w = torch.ones(1000)
    pending = Store(tmp_path).save_in_background({"w": w}, staging="overlapped", changing=[w])
    w.zero_()
    assert_same(pending.wait().load(), {"w": torch.ones(1000)})


def test_a_pending_save_says_how_far_it_is_and_is_not_waited_for_without_end(
    tmp_path: Path, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    pending = store.save_in_background({"w": torch.ones(3)}, staging="overlapped")
    assert repr(pending) == f"<PendingSave {tmp_path / 'checkpoint_0'}: being copied>"
    with pytest.raises(StillSavingError, match=r"_0 is not committed after 0\.05 s: it is being copied"):
        pending.wait(timeout_s=0.05)
    with pytest.raises(TimeoutError):
        pending.wait(0)
    held.opened.set()
    assert pending.wait(60).path == pending.place
    assert repr(pending).endswith("checkpoint_0: committed>")
    monkeypatch.setattr(store._saves, "_committed", lambda *_: 1 / 0)
    failed = store.save_in_background({"w": torch.ones(3)})
    with pytest.raises(BackgroundSaveError, match="division by zero"):
        failed.wait(60)
    assert "checkpoint_1: failed (ZeroDivisionError" in repr(failed)
