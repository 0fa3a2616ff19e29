"""Threads that copy from one device on one stream come back to their own device and stream."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from keepstep.checkpoint.saving.staging import SideStreams


class Machine(threading.local):
    """What a thread is on, as the driver keeps it: new threads begin on device 0."""

    device = 0

    def __init__(self) -> None:
        self.streams: dict[int, Any] = {}

    def current_stream(self, device: Any = None) -> Any:
        return self.streams.get(self.device, _Stream(self.device))

    def set_stream(self, stream: Any) -> None:
        self.device = stream.device
        self.streams[stream.device] = stream

    @contextlib.contextmanager
    def device_index(self, index: int) -> Iterator[None]:
        before, self.device = self.device, index
        yield
        self.device = before


class _Stream:
    def __init__(self, device: Any) -> None:
        self.device = device.index if isinstance(device, torch.device) else device

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> object:
        return None


class _OnDevice:
    device = torch.device("cuda", 3)


def test_threads_that_cross_come_back_to_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training's thread is on device 3 and a stream of its own, those of the save begin on 0."""
    machine = Machine()
    monkeypatch.setattr(torch, "Stream", _Stream)
    for name in ("current_stream", "set_stream", "device_index"):
        monkeypatch.setattr(torch.accelerator, name, getattr(machine, name))
    own = _Stream(3)
    machine.set_stream(own)
    streams, tensor = SideStreams([_OnDevice.device]), _OnDevice()
    entered, crossed, found = threading.Event(), threading.Event(), list[int]()

    def copy() -> None:
        with streams.on(tensor):  # type: ignore[arg-type]
            entered.set()
            assert crossed.wait(30)
        found.append(machine.device)

    crew = threading.Thread(target=copy)
    crew.start()
    assert entered.wait(30)
    with streams.on(tensor) as stream:  # type: ignore[arg-type]
        assert machine.current_stream() is stream
        crossed.set()
        crew.join(30)
    assert found == [0]
    assert machine.device == 3
    assert machine.current_stream() is own
