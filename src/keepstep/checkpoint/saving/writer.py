"""Tensors -> segment files: copy, hash and write in one pass, from several threads.

Two ways through the same blocks:

* `write`: each thread copies a block from the live tensors, hashes it while it is in the cache and
  writes it. Memory: a block a thread. The state must not change until it returns.
* `stage` then `drain`: blocks are copied as fast as memory takes it (waiting for free ones if the state is
  larger than the budget), the threads hash and write behind it. The state may change once `stage` returns.

Segments that an earlier checkpoint holds byte for byte are linked, not written; they are looked for while
those that it does not hold are on their way.
NumPy copies, xxhash and pwrite all release the GIL.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from keepstep.checkpoint.crew import Crew
from keepstep.checkpoint.format.hashing import Aborted, OrderedHasher
from keepstep.checkpoint.format.manifest import FileEntry, combine_digests, digest_of
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.saving.filling import Job, Line, OpenSegment, Piece
from keepstep.checkpoint.saving.layout import Layout
from keepstep.checkpoint.saving.linking import Twin
from keepstep.checkpoint.saving.staging import BLOCK_BYTES, Block, BlockPool, TensorBytes
from keepstep.checkpoint.saving.tracking import KnownDigests
from keepstep.checkpoint.saving.unchanged import Comparison
from keepstep.files import PAGE_BYTES
from keepstep.outcome import Latch, Outcome, wait_for_all

__all__ = ["WRITER_THREADS", "SegmentWriter"]

log = logging.getLogger(__name__)

WRITER_THREADS = 3
"""Two keep the disk busy; the third copies and hashes meanwhile (1.2 times the disk's floor, not 1.4)."""


class SegmentWriter:
    """Writes the segments of one checkpoint into a workspace.

    Args:
        workspace: where to.
        layout: which segments.
        sources: the bytes of each planned tensor, by its index.
        devices: accelerators that the tensors lie on.
        twins: segments of an earlier checkpoint that may be the same, by the name of the new one.
        known: digests of memory that has not been written to.
        pool: blocks to copy into.
        crew: of WRITER_THREADS and one; closed by `drain` and `abort`.
    """

    def __init__(
        self,
        workspace: Workspace,
        layout: Layout,
        sources: Sequence[TensorBytes],
        *,
        devices: Sequence[torch.device],
        twins: Mapping[str, Twin],
        known: KnownDigests,
        pool: BlockPool,
        crew: Crew,
    ) -> None:
        self._workspace = workspace
        self._pool = pool
        self._crew = crew
        self._segments = [OpenSegment(segment) for segment in layout.segments]
        self._sources = sources
        self._devices = devices
        self._twins = twins
        self._known = known
        self._jobs: deque[Job] = deque()
        self._aborted = Latch()
        self._hasher = OrderedHasher(self._aborted)
        self._running: list[Outcome[None]] = []
        self.digests: dict[int, str] = {}
        """Digest of each stored tensor, by its index; complete after `write` or `drain`."""

    def _enter(self, index: int) -> int:
        """Let the blocks of a segment be taken; how many they are."""
        begins = range(0, self._segments[index].segment.bytes, BLOCK_BYTES)
        self._jobs.extend((index, begin) for begin in begins)
        return len(begins)

    # ------------------------------------------------------------------------------ the two ways

    def write(self) -> None:
        """Copy, hash and write everything; durable on return."""
        self.synchronize()
        try:
            for index in self._to_be_written():
                for _ in range(min(WRITER_THREADS, self._enter(index))):
                    self._running.append(
                        self._crew.submit(lambda: self._guarded(self._copy_and_write_blocks))
                    )
        except BaseException:
            self.abort()
            raise
        self.drain()

    def synchronize(self) -> None:
        """Wait for what was queued on the devices, on whatever stream: the copies begin after it."""
        for device in self._devices:
            torch.accelerator.synchronize(device)

    def step_back(self) -> None:
        """Let the training's threads go first."""
        self._crew.step_back()

    def stage(self) -> None:
        """Copy everything; hashing and writing go on behind. The tensors may change afterwards.

        Two threads of the crew copy: one alone does not get all that memory can give. This one only waits:
        the handler of a signal may run on it meanwhile, for as long as it likes, and may save as well.
        """
        line = Line(self._hand_over)
        copying: list[Outcome[None]] = []
        try:
            self._copy_all(line, copying)
        except BaseException:
            self._stop_threads()
            wait_for_all(copying)  # what they still hand on comes before the end of the crew
            self.abort()
            raise
        finally:
            for block in line.left():
                self._pool.release(block)
        errors = [error for outcome in copying if (error := outcome.error()) is not None]
        for error in errors:
            if not isinstance(error, Aborted):
                self.abort()
                raise error
        if errors:
            self._running += copying  # what was copied could not be written: drain() raises what happened
        for source in self._sources:
            source.release()

    def _copy_all(self, line: Line, copying: list[Outcome[None]]) -> None:
        def copy() -> None:
            copying.append(self._crew.submit(lambda: self._guarded(self._copy_blocks, line)))

        for index in self._to_be_written():
            if self._enter(index) and (not copying or copying[-1].done()):
                copy()
        if len(self._jobs) > 1:
            copy()
        wait_for_all(copying)
        if self._jobs and not self._aborted.is_open:  # the first one ended just before the last came
            copy()
            wait_for_all(copying)

    def drain(self) -> None:
        """Wait until all that was staged is durable."""
        self._crew.close()
        self._settle(self._running)

    def abort(self) -> None:
        """Stop as soon as possible, wait for the threads, close the files without any promise."""
        self._stop_threads()
        self._crew.close()
        self._crew.wait()
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
                bytes=segment.bytes,
                digest=combine_digests(parts),
                header_bytes=len(segment.header),
                within=opened.within,
            )
        return entries

    # ------------------------------------------------------------------------------------ linking

    def _to_be_written(self) -> Iterator[int]:
        """Link the segments whose tensors are, byte for byte, those of their twins; the others, as found."""
        alike = []
        for index, opened in enumerate(self._segments):
            compared = self._compared(opened)
            if compared is not None and compared.begins_alike():
                alike.append((index, compared))
            else:
                yield index
        for index, compared in alike:
            if not (compared.ends_alike() and self._link(self._segments[index])):
                yield index

    def _compared(self, opened: OpenSegment) -> Comparison | None:
        twin = self._twins.get(opened.segment.file)
        if twin is None:
            return None
        sources = [self._sources[placement.index] for placement in opened.segment.placements]
        return Comparison(sources, twin.digests, self._known)

    def _link(self, opened: OpenSegment) -> bool:
        twin = self._twins[opened.segment.file]
        try:
            opened.within = self._workspace.link(
                opened.segment.file, twin.checkpoint, twin.file, twin.committed
            )
        except OSError as error:  # deleted meanwhile, or the disk refuses: it is written
            log.debug("%s can't be linked (%s); it is written", opened.segment.file, error)
            return False
        self.digests.update((p.index, twin.digests[n]) for n, p in enumerate(opened.segment.placements))
        return True

    # ----------------------------------------------------------------------------------- threads

    def _settle(self, outcomes: list[Outcome[None]]) -> None:
        try:
            wait_for_all(outcomes)
            errors = [error for outcome in outcomes if (error := outcome.error()) is not None]
        except BaseException:  # Ctrl-C while waiting
            self._stop_threads()
            wait_for_all(outcomes)
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
        self._aborted.open()
        self._pool.wake()
        self._hasher.wake()
        for opened in self._segments:
            with opened.lock:  # a file that is made later finds `aborted` open
                if opened.file is not None:
                    opened.file.stop()

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException:
            self._stop_threads()
            raise

    def _take_block(self) -> Job | None:
        try:
            return self._jobs.popleft()
        except IndexError:
            return None

    def _copy_and_write_blocks(self) -> None:
        while True:
            # Memory first: whoever has taken a part must be able to finish it, since others may wait for it.
            block = self._pool.acquire(self._aborted)
            job = self._take_block()
            if job is None:
                self._pool.release(block)
                return
            self._copy(job, block)
            self._hash_and_write(job, block)

    def _copy_blocks(self, line: Line) -> None:
        while True:
            block = self._pool.acquire(self._aborted)
            with line.taking:
                job = self._take_block()
                place = line.join() if job is not None else 0
            if job is None:
                self._pool.release(block)
                return
            self._copy(job, block)
            line.ready(place, job, block)

    def _hand_over(self, job: Job, block: Block) -> None:
        try:
            self._running.append(self._crew.submit(lambda: self._guarded(self._hash_and_write, job, block)))
        except RuntimeError:  # no more threads; after Ctrl-C, though, it may have been handed in
            self._pool.release(block)
            raise

    # ------------------------------------------------------------------------------------ blocks

    def _copy(self, job: Job, block: Block) -> None:
        try:
            if self._aborted.is_open:
                raise Aborted
            self._fill(job, block)
        except BaseException:
            self._pool.release(block)
            raise

    def _fill(self, job: Job, block: Block) -> None:
        opened, begin, end = self._range(job)
        header = opened.segment.header
        if begin < len(header):
            part = header[begin:end]
            block.view[: len(part)] = part
        for piece in self._pieces(job):
            source = self._sources[piece.placement.index]
            source.copy_into(block, piece.at, piece.begin, piece.end)

    def _pieces(self, job: Job) -> Iterator[Piece]:
        opened, begin, end = self._range(job)
        return opened.pieces(begin, end)

    def _range(self, job: Job) -> tuple[OpenSegment, int, int]:
        opened = self._segments[job[0]]
        return opened, job[1], min(job[1] + BLOCK_BYTES, opened.segment.bytes)

    def _hash(self, piece: Piece, data: memoryview) -> None:
        index = piece.placement.index
        digest = self._hasher.feed(index, piece.begin, piece.placement.bytes, data)
        if digest is not None:
            self.digests[index] = digest
            self._sources[index].release()

    def _hash_and_write(self, job: Job, block: Block) -> None:
        try:
            if self._aborted.is_open:
                raise Aborted
            for piece in self._pieces(job):
                self._hash(piece, block.view[piece.at : piece.at + piece.end - piece.begin])
            self._write(*self._range(job), block)
        finally:
            self._pool.release(block)

    def _write(self, opened: OpenSegment, begin: int, end: int, block: Block) -> None:
        with opened.lock:
            if self._aborted.is_open:
                raise Aborted
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
