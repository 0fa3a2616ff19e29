"""Saves and deletions of one process, one in the middle of the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from keepstep.checkpoint.place.in_use import KeysInUse


class _Interrupted(list[str]):
    """A signal comes each time it is gone through."""

    def __iter__(self) -> Iterator[str]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return super().__iter__()


@pytest.mark.timeout(10)
def test_a_handler_that_saves_amid_a_deletion_waits_for_nothing_and_keeps_what_it_linked() -> None:
    keys = KeysInUse()
    linked = []

    def handler(*_: object) -> None:
        assert keys.link("new")
        linked.append("new")
        keys.unlink(["old"])

    assert keys.link("old")
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with keys.deleting(_Interrupted(["old", "new"])) as free:
            assert free == {"old"}
            assert not keys.link("old")
            assert keys.link("new")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert linked == ["new"]
    assert keys.link("old")
