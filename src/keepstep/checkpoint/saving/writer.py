"""Tensors -> segment files: copy, hash and write in one pass, from several threads.

Two ways through the same blocks:

* `write`: each thread copies a block from the live tensors, hashes it while it is in the cache and
  writes it. Memory: a block a thread. The state must not change until it returns.
* `stage` then `drain`: the caller copies all blocks (waiting for free ones if the state is larger
  than the budget), the threads hash and write behind it. The state may change once `stage` returns.

NumPy copies, xxhash and pwrite all release the GIL.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from keepstep.checkpoint.format.hashing import Aborted, OrderedHasher
from keepstep.checkpoint.format.manifest import FileEntry, combine_digests, digest_of
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.saving.layout import Layout, Placement, Segment
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, Block, BlockPool, TensorBytes
from keepstep.files import PAGE_BYTES, SegmentFile

__all__ = ["WRITER_THREADS", "SegmentWriter"]

WRITER_THREADS = 3
"""Two keep the disk busy; the third copies and hashes meanwhile (1.2 times the disk's floor, not 1.4)."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Part of a tensor inside a block: tensor bytes begin..end lie at `at` in the block."""

    placement: Placement
    begin: int
    end: int
    at: int


class _OpenSegment:
    """A segment being written: opened with its first block, made durable with its last."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.ends = [p.offset + p.bytes for p in segment.placements]
        self.blocks_left = -(-segment.bytes // BLOCK_BYTES)
        self.file: SegmentFile | None = None
        self.lock = threading.Lock()

    def pieces(self, begin: int, end: int) -> Iterator[_Piece]:
        placements = self.segment.placements
        for index in range(bisect.bisect_right(self.ends, begin), len(placements)):
            placement = placements[index]
            if placement.offset >= end:
                return
            first = max(begin, placement.offset)
            last = min(end, placement.offset + placement.bytes)
            if first < last:
                yield _Piece(placement, first - placement.offset, last - placement.offset, first - begin)


class SegmentWriter:
    """Writes the segments of one checkpoint into a workspace."""

    def __init__(
        self,
        workspace: Workspace,
        layout: Layout,
        tensors: Sequence[torch.Tensor],
        pool: BlockPool,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._workspace = workspace
        self._pool = pool
        self._threads = threads
        self._segments = [_OpenSegment(segment) for segment in layout.segments]
        self._sources = [TensorBytes(tensor) for tensor in tensors]
        self._devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        self._blocks = iter(
            (index, begin)
            for index, segment in enumerate(layout.segments)
            for begin in range(0, segment.bytes, BLOCK_BYTES)
        )
        self._next_block = threading.Lock()
        self._aborted = threading.Event()
        self._hasher = OrderedHasher(self._aborted)
        self._running: list[Future[None]] = []
        self.digests: dict[int, str] = {}
        """Digest of each stored tensor, by its index; complete after `write` or `drain`."""

    # ------------------------------------------------------------------------------ the two ways

    def write(self) -> None:
        """Copy, hash and write everything; durable on return."""
        for device in self._devices:  # what the caller has queued on a stream of its own comes first
            torch.accelerator.synchronize(device)
        for _ in range(WRITER_THREADS):
            self._running.append(self._threads.submit(self._guarded, self._copy_and_write_blocks))
        self._settle(self._running)

    def stage(self) -> None:
        """Copy everything; hashing and writing go on behind. The tensors may change afterwards."""
        try:
            while (job := self._take_block()) is not None:
                block = self._pool.acquire(self._aborted)
                try:
                    self._fill(job, block)
                except BaseException:
                    self._pool.release(block)
                    raise
                self._running.append(self._threads.submit(self._guarded, self._hash_and_write, job, block))
        except Aborted:
            pass  # drain() raises what really happened
        except BaseException:
            self.abort()
            raise
        for source in self._sources:
            source.release()

    def drain(self) -> None:
        """Wait until all that was staged is durable."""
        self._settle(self._running)

    def abort(self) -> None:
        """Stop as soon as possible, wait for the threads, close the files without any promise."""
        self._stop_threads()
        wait(self._running)
        for segment in self._segments:
            if segment.file is not None:
                segment.file.abandon()

    def file_entries(self) -> dict[str, FileEntry]:
        """Manifest entries of the segments."""
        entries = {}
        for opened in self._segments:
            segment = opened.segment
            parts = [digest_of(segment.header), *(self.digests[p.index] for p in segment.placements)]
            entries[segment.file] = FileEntry(
                bytes=segment.bytes, digest=combine_digests(parts), header_bytes=len(segment.header)
            )
        return entries

    # ----------------------------------------------------------------------------------- threads

    def _settle(self, futures: list[Future[None]]) -> None:
        try:
            wait(futures)
            errors = [error for future in futures if (error := future.exception()) is not None]
        except BaseException:  # Ctrl-C while waiting
            self._stop_threads()
            wait(futures)
            self.abort()
            raise
        real = [error for error in errors if not isinstance(error, Aborted)]
        if errors:
            self.abort()
            raise real[0] if real else errors[0]
        for opened in self._segments:
            for placement in opened.segment.placements:  # empty tensors are in no block
                self.digests.setdefault(placement.index, digest_of(b""))

    def _stop_threads(self) -> None:
        self._aborted.set()
        self._pool.wake()
        self._hasher.wake()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException:
            self._stop_threads()
            raise

    def _take_block(self) -> tuple[int, int] | None:
        with self._next_block:
            return next(self._blocks, None)

    def _copy_and_write_blocks(self) -> None:
        while True:
            # Memory first: whoever has taken a part must be able to finish it, since others may wait for it.
            block = self._pool.acquire(self._aborted)
            job = self._take_block()
            if job is None:
                self._pool.release(block)
                return
            try:
                self._fill(job, block)
            except BaseException:
                self._pool.release(block)
                raise
            self._hash_and_write(job, block)

    # ------------------------------------------------------------------------------------ blocks

    def _fill(self, job: tuple[int, int], block: Block) -> None:
        opened, begin, end = self._range(job)
        header = opened.segment.header
        if begin < len(header):
            part = header[begin:end]
            block.view[: len(part)] = part
        for piece in opened.pieces(begin, end):
            source = self._sources[piece.placement.index]
            source.copy_into(
                block.array[piece.at : piece.at + piece.end - piece.begin], piece.begin, piece.end
            )

    def _hash_and_write(self, job: tuple[int, int], block: Block) -> None:
        try:
            if self._aborted.is_set():
                raise Aborted
            opened, begin, end = self._range(job)
            for piece in opened.pieces(begin, end):
                self._hash(piece, block.view[piece.at : piece.at + piece.end - piece.begin])
            self._write(opened, begin, end, block)
        finally:
            self._pool.release(block)

    def _range(self, job: tuple[int, int]) -> tuple[_OpenSegment, int, int]:
        opened = self._segments[job[0]]
        return opened, job[1], min(job[1] + BLOCK_BYTES, opened.segment.bytes)

    def _hash(self, piece: _Piece, data: memoryview) -> None:
        index = piece.placement.index
        digest = self._hasher.feed(index, piece.begin, piece.placement.bytes, data)
        if digest is not None:
            self.digests[index] = digest
            self._sources[index].release()

    def _write(self, opened: _OpenSegment, begin: int, end: int, block: Block) -> None:
        with opened.lock:
            if opened.file is None:
                segment = opened.segment
                opened.file = self._workspace.create_segment(segment.file, segment.bytes)
        padded = -(-(end - begin) // PAGE_BYTES) * PAGE_BYTES
        opened.file.write_at(block.view[:padded], begin)
        with opened.lock:
            opened.blocks_left -= 1
            last = opened.blocks_left == 0
        if last:
            opened.file.finish()
