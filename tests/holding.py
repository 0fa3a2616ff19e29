"""What waits until a test lets it go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from keepstep.checkpoint.saving.staging import TensorBytes

PATIENCE_S = 60


class Held:
    """Copies of a state wait while it is closed; it begins open. Counts what is copied at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.opened.set()
        self.at_once = 0
        copy_into, take_copy = TensorBytes.copy_into, TensorBytes.take_copy

        def copy_when_opened(source: TensorBytes, *args: Any) -> None:
            assert self.opened.wait(PATIENCE_S)
            copy_into(source, *args)

        def count(source: TensorBytes) -> None:
            self.at_once += 1
            take_copy(source)

        monkeypatch.setattr(TensorBytes, "copy_into", copy_when_opened)
        monkeypatch.setattr(TensorBytes, "take_copy", count)

    def holds_up(self, work: Callable[[], object]) -> None:
        """See that `work` does not end before the copies go on, and that it ends then."""
        working = threading.Thread(target=work)
        working.start()
        working.join(0.1)
        assert working.is_alive(), "it did not wait for the copy"
        self.opened.set()
        working.join(PATIENCE_S)
        assert not working.is_alive(), "it still waits"


@contextlib.contextmanager
def copies_held() -> Iterator[Held]:
    """Closed from the beginning of the block, open from its end; for processes that have no fixtures."""
    with pytest.MonkeyPatch.context() as patched:
        held = Held(patched)
        held.opened.clear()
        try:
            yield held
        finally:
            held.opened.set()


def at_call(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, first: Callable[[], object]) -> None:
    """Have `first` called by whoever calls the method, before that does its work."""
    real = getattr(owner, method)

    def call(*args: Any, **options: Any) -> Any:
        first()
        return real(*args, **options)

    monkeypatch.setattr(owner, method, call)
