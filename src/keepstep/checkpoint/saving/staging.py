"""Live tensors -> page-aligned host blocks, within a memory budget.

Blocks are kept and used again: fresh memory costs more than the copy into it.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import torch

from keepstep.checkpoint.format.hashing import Aborted
from keepstep.checkpoint.format.manifest import digest_of
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.dense import flat_bytes
from keepstep.errors import UsageError
from keepstep.outcome import LOOK_UP_S, Bell, Latch
from keepstep.pages import huge_pages

__all__ = ["BLOCK_BYTES", "Block", "BlockPool", "SideStreams", "TensorBytes", "dense_bytes"]

BLOCK_BYTES: Final = 8 << 20
"""A block is copied, hashed and written while it is in the processor's cache."""


class Block:
    """Page-aligned memory, as a NumPy array to copy into and as a memoryview to hash and write.

    Args:
        size_bytes: a multiple of the page size.
        pinned: locked into memory, so that an accelerator can write to it by itself.
    """

    def __init__(self, size_bytes: int, *, pinned: bool = False) -> None:
        self.array: np.ndarray[Any, np.dtype[np.uint8]]
        if pinned:
            self.array = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            self.array = np.frombuffer(huge_pages(size_bytes), dtype=np.uint8)
        self.view: memoryview = self.array.data
        self.address: int = self.array.ctypes.data


class BlockPool:
    """Blocks up to a budget. `acquire` waits until one is free."""

    def __init__(self, budget_bytes: int) -> None:
        if not isinstance(budget_bytes, int) or budget_bytes < 2 * BLOCK_BYTES:
            raise UsageError(
                f"memory_budget_bytes is {budget_bytes!r}; expected a whole number: at least "
                f"{2 * BLOCK_BYTES} (two blocks) are needed to save"
            )
        self._most = budget_bytes // BLOCK_BYTES
        self._made = 0
        self._pinned = False
        self._free: list[Block] = []
        self._lock = threading.Lock()
        self._changed = Bell()

    @property
    def allocated_bytes(self) -> int:
        """Memory taken so far; it is kept for the next save."""
        return self._made * BLOCK_BYTES

    def pin(self) -> None:
        """From now on hand out memory that accelerators can write to by themselves."""
        with self._lock:
            if not self._pinned:
                self._made -= len(self._free)
                self._pinned = True
                self._free.clear()

    def acquire(self, aborted: Latch) -> Block:
        """A free block, made if the budget allows, else waited for.

        Raises:
            Aborted: `aborted` was opened; `wake` makes it quick.
        """
        while True:
            with self._lock:
                if self._free:
                    return self._free.pop()
                if self._made < self._most:
                    block = Block(BLOCK_BYTES, pinned=self._pinned)
                    self._made += 1
                    return block
                changed = self._changed.next_ring
            if aborted.is_open:
                raise Aborted
            changed.wait(LOOK_UP_S)

    def release(self, block: Block) -> None:
        """Give a block back."""
        with self._lock:
            self._free.append(block)
            self._changed.ring()

    def wake(self) -> None:
        """Let waiting threads see that their save was aborted."""
        with self._lock:
            self._changed.ring()


class TensorBytes:
    """A tensor's bytes in row-major order, made when first asked for.

    A dense CPU tensor is looked at where it lies. Any other (another device, strided, conjugated) is made
    dense while its bytes are being staged; on another device, where memory is short, until the last is here.
    """

    __slots__ = ("_dense", "_left_bytes", "_lock", "_streams", "_tensor", "bytes")

    def __init__(self, tensor: torch.Tensor, streams: SideStreams | None = None) -> None:
        self._tensor: torch.Tensor | None = tensor
        self.bytes = tensor.nbytes
        self._streams = None if tensor.device.type == "cpu" else streams
        self._dense: torch.Tensor | None = None
        self._left_bytes = tensor.nbytes  # on another device: what is not on the host yet
        self._lock = threading.Lock()

    def copy_into(self, block: Block, at: int, begin: int, end: int) -> None:
        """Copy bytes `begin` to `end` into `block`, from `at` on; several threads may do so at once.

        Each byte is copied once: another device's tensor is let go of with its last one.
        """
        dense = self._tensor
        if self._dense is not None or dense is None or self._streams is not None or not _is_dense(dense):
            dense = self._dense_bytes()
        else:
            _check_memory(dense)
        if self._streams is None:  # by address: a view of its bytes would cost many times the copy, if small
            ctypes.memmove(block.address + at, dense.data_ptr() + begin, end - begin)
        else:
            self._streams.copy(dense[begin:end], block.array[at : at + end - begin])
            with self._lock:
                self._left_bytes -= end - begin
                if not self._left_bytes:
                    self.release()

    def provably_matches(self, expected: str, known: KnownDigests) -> bool:
        """Whether the bytes have this digest, as far as that is known without reading them."""
        if self._streams is None and self._dense is None and self._tensor is not None:
            _check_memory(self._tensor)
            return known.proves(self._tensor, expected)
        return False

    def matches(self, expected: str, known: KnownDigests) -> bool:
        """Whether the bytes have this digest."""
        tensor, data = self._tensor, self._host_view()
        if self._streams is None and self._dense is None and tensor is not None and _is_dense(tensor):
            return known.matches(tensor, data, expected)
        return digest_of(data) == expected

    def _host_view(self) -> memoryview:
        """The bytes, to be looked at. A dense copy is not kept: all those of a state may be too much."""
        dense = self._dense if self._dense is not None else self._make_dense()
        if self._streams is None:
            view: memoryview = dense.numpy().data
            return view
        host = np.empty(dense.numel(), dtype=np.uint8)
        self._streams.copy(dense, host)
        return host.data

    def _dense_bytes(self) -> torch.Tensor:
        dense = self._dense
        if dense is None:
            with self._lock:
                if self._dense is None:
                    self._dense = self._make_dense()
                dense = self._dense
        return dense

    def _make_dense(self) -> torch.Tensor:
        assert self._tensor is not None, "staged after it was released"
        with contextlib.nullcontext() if self._streams is None else self._streams.on(self._tensor):
            return dense_bytes(self._tensor)

    def take_copy(self) -> None:
        """Copy the tensor now: it may change before it is staged."""
        assert self._tensor is not None, "copied after it was released"
        self._dense = dense_bytes(self._tensor).clone()

    def release(self) -> None:
        """Let go of the tensor."""
        self._tensor = self._dense = None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the bytes in memory are the tensor's, in order."""
    return tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def _check_memory(tensor: torch.Tensor) -> None:
    """Refuse to read beyond the end of a tensor's memory, which torch lets others resize.

    Raises:
        UsageError: it has less memory than elements.
    """
    memory, elements = tensor.untyped_storage(), tensor.numel()
    if not tensor.is_contiguous() and elements:
        elements = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    needed_bytes = (tensor.storage_offset() + elements) * tensor.itemsize if elements else 0
    if memory.nbytes() < needed_bytes:
        raise UsageError(
            f"a tensor of shape {list(tensor.shape)} needs {needed_bytes} bytes of memory and has "
            f"{memory.nbytes()}: its storage was resized. Save it before its memory is given back"
        )


def dense_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements, dense and row-major, as a flat tensor of bytes on its device.

    Raises:
        UsageError: it has less memory than elements.
    """
    _check_memory(tensor)
    plain = tensor if not (tensor.is_conj() or tensor.is_neg()) else tensor.resolve_conj().resolve_neg()
    return flat_bytes(plain.contiguous())


class SideStreams:
    """Copies from devices to the host on streams of their own, beside the training's.

    All saves of the process have the same ones: torch keeps memory that was given back for the stream that
    it was taken on, so that what is made dense on another stream each time would take new memory each time.

    They begin after what the training had queued when the save began, and before nothing: the optimizer
    waits on the host until everything is staged.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = {device: _stream_of(device) for device in devices}
        self.follow()

    def follow(self) -> None:
        """Let copies begin after all that the calling thread has queued by now."""
        for device, stream in self._streams.items():
            stream.wait_event(torch.accelerator.current_stream(device).record_event())

    @contextlib.contextmanager
    def on(self, tensor: torch.Tensor) -> Iterator[torch.Stream]:
        """What this thread queues meanwhile goes to the stream of the tensor's device.

        Not by `with stream`: that keeps what to go back to in the stream, which several threads enter, and
        would leave one of them on the device of another.
        """
        stream = self._streams[tensor.device]
        with torch.accelerator.device_index(tensor.device.index):
            before = torch.accelerator.current_stream()
            torch.accelerator.set_stream(stream)
            try:
                yield stream
            finally:
                torch.accelerator.set_stream(before)

    def copy(self, source: torch.Tensor, target: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Copy device bytes into host memory; they are there on return."""
        with self.on(source) as stream:
            torch.from_numpy(target).copy_(source, non_blocking=True)
        stream.synchronize()


def _stream_of(device: torch.device) -> torch.Stream:
    # No lock: the handler of a signal may begin a save in the middle of this.
    stream = _streams.get(device)
    return stream if stream is not None else _streams.setdefault(device, torch.Stream(device))


_streams: Final[dict[torch.device, torch.Stream]] = {}
"""The side stream of each device."""
