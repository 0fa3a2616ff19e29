"""Live tensors -> page-aligned host blocks, within a memory budget.

Blocks are kept and used again: fresh memory costs more than the copy into it.
"""

from __future__ import annotations

import mmap
import threading
from typing import Any, Final

import numpy as np
import torch

from keepstep.checkpoint.format.hashing import Aborted
from keepstep.errors import UsageError

__all__ = ["BLOCK_BYTES", "Block", "BlockPool", "TensorBytes"]

BLOCK_BYTES: Final = 8 << 20
"""A block is copied, hashed and written while it is in the processor's cache."""


class Block:
    """Page-aligned memory, as a NumPy array to copy into and as a memoryview to hash and write."""

    def __init__(self, size_bytes: int) -> None:
        # Private: pages of a shared mapping take twice as long to come.
        self._memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.array: np.ndarray[Any, np.dtype[np.uint8]] = np.frombuffer(self._memory, dtype=np.uint8)
        self.view = memoryview(self._memory)


class BlockPool:
    """Blocks up to a budget. `acquire` waits until one is free."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 2 * BLOCK_BYTES:
            raise UsageError(
                f"memory_budget_bytes is {budget_bytes}; at least {2 * BLOCK_BYTES} (two blocks) "
                "are needed to save"
            )
        self._most = budget_bytes // BLOCK_BYTES
        self._made = 0
        self._free: list[Block] = []
        self._changed = threading.Condition()

    @property
    def allocated_bytes(self) -> int:
        """Memory taken so far; it is kept for the next save."""
        return self._made * BLOCK_BYTES

    def acquire(self, aborted: threading.Event) -> Block:
        """A free block, made if the budget allows, else waited for.

        Raises:
            Aborted: `aborted` was set; `wake` must be called after setting it.
        """
        with self._changed:
            while not self._free and self._made >= self._most:
                if aborted.is_set():
                    raise Aborted
                self._changed.wait()
            if self._free:
                return self._free.pop()
            block = Block(BLOCK_BYTES)
            self._made += 1
            return block

    def release(self, block: Block) -> None:
        """Give a block back."""
        with self._changed:
            self._free.append(block)
            self._changed.notify()

    def wake(self) -> None:
        """Let waiting threads see that their save was aborted."""
        with self._changed:
            self._changed.notify_all()


class TensorBytes:
    """A tensor's bytes in row-major order, made when first asked for.

    A dense CPU tensor is looked at where it lies. Any other (another device, strided, conjugated) is
    copied to dense host memory while its bytes are being staged.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._array: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._lock = threading.Lock()

    def copy_into(self, target: np.ndarray[Any, np.dtype[np.uint8]], begin: int, end: int) -> None:
        """Copy bytes `begin` to `end` into `target`; several threads may do so at once."""
        array = self._array
        if array is None:
            with self._lock:
                if self._array is None:
                    assert self._tensor is not None, "staged after it was released"
                    self._array = host_bytes(self._tensor)
                array = self._array
        np.copyto(target, array[begin:end])

    def release(self) -> None:
        """Let go of the tensor."""
        self._tensor = self._array = None


def host_bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A tensor's elements, dense and row-major, as bytes on the host; shares memory where it can."""
    plain = tensor.device.type == "cpu" and not tensor.is_conj() and not tensor.is_neg()
    dense = (tensor if plain else tensor.resolve_conj().resolve_neg().to("cpu")).detach().contiguous()
    array: np.ndarray[Any, np.dtype[np.uint8]] = dense.reshape(-1).view(torch.uint8).numpy()
    return array
