"""Copies of a state that wait until a test lets them go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from keepstep.checkpoint.saving.staging import TensorBytes


class Held:
    """Copies wait while it is closed; it begins open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.opened.set()
        real = TensorBytes.copy_into

        def copy_into(source: TensorBytes, *args: Any) -> None:
            assert self.opened.wait(60)
            real(source, *args)

        monkeypatch.setattr(TensorBytes, "copy_into", copy_into)

    def holds_up(self, work: Callable[[], object]) -> None:
        """See that `work` does not end before the copies go on, and that it ends then."""
        working = threading.Thread(target=work)
        working.start()
        working.join(0.1)
        assert working.is_alive(), "it did not wait for the copy"
        self.opened.set()
        working.join(60)
        assert not working.is_alive(), "it still waits"
