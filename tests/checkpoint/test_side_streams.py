"""Copies from other devices: on one stream a device, whichever threads and saves make them."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from keepstep.checkpoint.saving import staging
from keepstep.checkpoint.saving.staging import Block, SideStreams, TensorBytes
from keepstep.files import PAGE_BYTES


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

    def synchronize(self) -> None: ...


class _OnDevice:
    device = torch.device("cuda", 3)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """In place of torch's streams."""
    machine = Machine()
    monkeypatch.setattr(staging, "_streams", {})
    monkeypatch.setattr(torch, "Stream", _Stream)
    for name in ("current_stream", "set_stream", "device_index"):
        monkeypatch.setattr(torch.accelerator, name, getattr(machine, name))
    return machine


def test_threads_that_cross_come_back_to_where_they_were(machine: Machine) -> None:
    """The training's thread is on device 3 and a stream of its own, those of the save begin on 0."""
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


def test_each_save_copies_on_the_stream_of_the_one_before(machine: Machine) -> None:
    """Torch keeps the memory of each stream for that stream: on another one a save would take new memory."""
    used = []
    for devices in ([3], [0, 3]):
        streams = SideStreams(torch.device("cuda", index) for index in devices)
        with streams.on(_OnDevice()) as stream:  # type: ignore[arg-type]
            used.append(stream)
    assert used[0] is used[1]


class _DeviceTensor(torch.Tensor):
    """Host memory that says it lies on a device."""

    device = torch.device("cuda", 3)  # type: ignore[assignment]


def test_device_memory_is_given_back_with_the_last_byte_that_was_copied(machine: Machine) -> None:
    """Hashing and writing may come much later."""
    live = torch.arange(6, dtype=torch.uint8).view(2, 3).t().as_subclass(_DeviceTensor)
    source = TensorBytes(live, SideStreams([_DeviceTensor.device]))
    block = Block(PAGE_BYTES)
    source.copy_into(block, 2, 2, 6)
    dense = weakref.ref(source._dense)
    assert dense() is not None
    source.copy_into(block, 0, 0, 2)
    assert dense() is None, "the dense copy is still there"
    assert block.array[:6].tolist() == [0, 3, 1, 4, 2, 5]
