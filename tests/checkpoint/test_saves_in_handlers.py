"""The handler of a signal saves wherever the thread that it runs on is just then."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep import Store
from keepstep.checkpoint.pending import PendingSave
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.files import LocalFiles

PATIENCE_S = 60


@contextlib.contextmanager
def handled_once(handle: Any) -> Iterator[None]:
    """The first SIGUSR1 is handled by `handle`."""

    def handler(*_: object) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        handle()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.timeout(90)
def test_a_background_save_begun_amid_another_one_is_waited_for_as_well(tmp_path: Path) -> None:
    opened = threading.Event()

    class Held(LocalFiles):
        def make_unfinished(self, path: Path) -> None:
            super().make_unfinished(path)
            signal.raise_signal(signal.SIGUSR1)

        def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
            if path.name == "manifest.json" and path.parent.name.startswith("checkpoint_1."):
                assert opened.wait(PATIENCE_S)
            super().write_file(path, data, durable=durable)

    store, inner = Store(tmp_path, files=Held()), list[PendingSave]()
    state = {"w": torch.ones(3)}
    with handled_once(lambda: inner.append(store.save_in_background(state, step=2))):
        outer = store.save_in_background(state, step=1)
    assert outer.wait().name == "checkpoint_0"
    assert store.busy
    threading.Timer(0.3, opened.set).start()
    store.wait()
    assert inner[0].done()
    assert [checkpoint.step for checkpoint in store.list()] == [1, 2]


def test_a_save_takes_another_number_than_the_one_that_was_made_while_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, state = Store(tmp_path), {"w": torch.ones(3)}
    real = LocalBackend.next_number

    def next_number(backend: LocalBackend) -> int:
        number = real(backend)
        signal.raise_signal(signal.SIGUSR1)
        return number

    monkeypatch.setattr(LocalBackend, "next_number", next_number)
    with handled_once(lambda: store.save(state, step=2)):
        store.save(state, step=1)
    assert [checkpoint.step for checkpoint in store.list()] == [2, 1]
