"""What the machine can do with the same bytes: no format, no hash, no names."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.workload import bytes_of

__all__ = ["Floors"]

_BLOCK_BYTES = 8 << 20
_PAGE_BYTES = 4096


class Floors:
    """A warm, page-aligned buffer that holds the bytes of a state.

    Args:
        tensors: dense tensors on the CPU.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._sources = [bytes_of(tensor) for tensor in tensors if tensor.numel()]
        self.bytes = sum(len(source) for source in self._sources)
        padded = -(-self.bytes // _PAGE_BYTES) * _PAGE_BYTES
        self._memory = mmap.mmap(-1, padded)
        self._array = np.frombuffer(self._memory, dtype=np.uint8)
        self._view = memoryview(self._memory)
        self.copy(1)

    def copy(self, threads: int) -> None:
        """Copy the state into the buffer: one memcpy a tensor, or a part of it."""
        places = []
        position = 0
        for source in self._sources:
            for begin in range(0, len(source), _BLOCK_BYTES):
                part = source[begin : begin + _BLOCK_BYTES]
                places.append((position + begin, part))
            position += len(source)

        def work(index: int) -> None:
            for begin, part in places[index::threads]:
                np.copyto(self._array[begin : begin + len(part)], part)

        _in_threads(work, threads)

    def write(self, path: Path, threads: int) -> None:
        """Write the buffer with O_DIRECT, where the file system takes it, and fsync."""
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_DIRECT", 0))
        try:
            os.posix_fallocate(fd, 0, len(self._view))

            def work(index: int) -> None:
                for begin in range(index * _BLOCK_BYTES, len(self._view), threads * _BLOCK_BYTES):
                    _write_all(fd, self._view[begin : begin + _BLOCK_BYTES], begin)

            _in_threads(work, threads)
            os.fsync(fd)
        finally:
            os.close(fd)

    def write_buffered(self, path: Path) -> None:
        """Write the buffer through the page cache, so that it is warm for `read`."""
        path.write_bytes(self._view)

    def read(self, path: Path, threads: int) -> None:
        """Read a file of this size into the buffer."""
        fd = os.open(path, os.O_RDONLY)
        try:

            def work(index: int) -> None:
                for begin in range(index * _BLOCK_BYTES, len(self._view), threads * _BLOCK_BYTES):
                    _read_all(fd, self._view[begin : begin + _BLOCK_BYTES], begin)

            _in_threads(work, threads)
        finally:
            os.close(fd)

    def read_files(self, paths: Sequence[Path], threads: int, *, direct: bool) -> None:
        """Read files of about this size in all, in blocks, past the page cache or through it."""
        flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
        fds = [os.open(path, flags) for path in paths]
        blocks = [
            (fd, begin)
            for fd, path in zip(fds, paths, strict=True)
            for begin in range(0, path.stat().st_size, _BLOCK_BYTES)
        ]
        buffers = [memoryview(mmap.mmap(-1, _BLOCK_BYTES)) for _ in range(threads)]

        def work(index: int) -> None:
            for fd, begin in blocks[index::threads]:
                _read_up_to(fd, buffers[index], begin)

        try:
            _in_threads(work, threads)
        finally:
            for fd in fds:
                os.close(fd)


def _in_threads(work: Callable[[int], None], threads: int) -> None:
    running = [threading.Thread(target=work, args=(index,)) for index in range(1, threads)]
    for thread in running:
        thread.start()
    work(0)
    for thread in running:
        thread.join()


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _read_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.preadv(fd, [data], offset)
        if count == 0:
            raise EOFError(f"the file ends at byte {offset}")
        data, offset = data[count:], offset + count


def _read_up_to(fd: int, data: memoryview, offset: int) -> None:
    """Fill `data`, or as much of it as there is in the file."""
    while data:
        count = os.preadv(fd, [data], offset)
        if count % _PAGE_BYTES or count == 0:  # the end of the file
            return
        data, offset = data[count:], offset + count
