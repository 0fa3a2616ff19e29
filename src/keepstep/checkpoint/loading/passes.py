"""One read of many stored ranges by several threads, each verified as it is read."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xxhash

from keepstep.checkpoint.crew import in_threads
from keepstep.checkpoint.format.boxes import Box, meeting, run_in
from keepstep.checkpoint.format.hashing import Aborted, OrderedHasher
from keepstep.checkpoint.format.manifest import ITEMSIZES, Chunk, TensorEntry, stored_parts
from keepstep.checkpoint.format.source import OpenFile, Place, Source
from keepstep.dense import flat_bytes
from keepstep.errors import DamagedCheckpointError, DigestError, FileSizeError
from keepstep.outcome import Latch

__all__ = [
    "Goal",
    "Pass",
    "Scattered",
    "Target",
    "batches",
    "bytes_of",
    "compare",
    "part_target",
    "verify_stored",
]

_PART_BYTES = 8 << 20


_Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_SCRATCH_BYTES = 256 << 20
"""Memory for parts of which only some elements are wanted; one larger part may take more."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a stored tensor's bytes go: a writable, dense byte array of just its size.

    With a `box` it takes only those elements; what is stored in one piece with them is read and verified.
    """

    address: str
    array: _Bytes
    box: Box | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """A stored range of bytes and where it goes, whole."""

    address: str
    stored: TensorEntry | Chunk
    array: _Bytes


@dataclass(frozen=True, slots=True)
class Scattered:
    """A stored range of which some elements go to places that are no single run."""

    goal: Goal
    stored: Box
    target: Target
    target_box: Box
    itemsize: int

    def copy(self) -> None:
        """Copy what is wanted from the scratch memory."""
        common = meeting(self.stored, self.target_box)
        assert common is not None
        there = _view_of(self.target.array, self.target_box, common, self.itemsize)
        there[...] = _view_of(self.goal.array, self.stored, common, self.itemsize)


@dataclass(frozen=True, slots=True)
class _Part:
    goal: Goal
    begin: int
    end: int


def part_target(target: Target, entry: TensorEntry, goals: list[Goal], scattered: list[Scattered]) -> None:
    """What of the stored ranges goes straight into the target, and what by way of other memory."""
    whole = Box((0,) * len(entry.shape), entry.shape)
    wanted, itemsize = target.box or whole, ITEMSIZES[entry.dtype]
    for stored in stored_parts(entry):
        box = Box(stored.at, stored.shape) if isinstance(stored, Chunk) else whole
        common = meeting(box, wanted)
        if common is None:
            continue
        run = run_in(wanted, box) if common == box else None
        if run is not None:
            array = target.array[run * itemsize : run * itemsize + stored.bytes]
            goals.append(Goal(target.address, stored, array))
        else:
            goal = Goal(target.address, stored, np.empty(0, dtype=np.uint8))
            scattered.append(Scattered(goal, box, target, wanted, itemsize))


class Pass:
    """One read of many parts by several threads, verified as it goes."""

    def __init__(
        self, source: Source, files: Mapping[str, OpenFile], goals: Iterable[Goal], started: set[str]
    ) -> None:
        self._source = source
        self._files = files
        self._parts = _in_parts(sorted(goals, key=lambda goal: (goal.stored.file or "", goal.stored.offset)))
        self._started = started
        self._take = threading.Lock()
        self._aborted = Latch()
        self._hasher = OrderedHasher(self._aborted)

    def run(self) -> None:
        """Read everything; raise at the first range that is not what was committed."""
        _run_threads(self._work, self._source.read_threads, self._stop)

    def _stop(self) -> None:
        self._aborted.open()
        self._hasher.wake()

    def _work(self) -> None:
        try:
            while not self._aborted.is_open:
                with self._take:
                    part = next(self._parts, None)
                if part is None:
                    return
                self._read(part)
        except BaseException:
            self._stop()
            raise

    def _read(self, part: _Part) -> None:
        address, stored = part.goal.address, part.goal.stored
        view = part.goal.array.data[part.begin : part.end]
        self._started.add(address)
        _fill(self._source, self._files, view, stored.offset + part.begin, stored.file or "")
        digest = self._hasher.feed(id(part.goal), part.begin, stored.bytes, view)
        if digest is not None:
            compare(self._source.place, address, stored, digest)


def _fill(source: Source, files: Mapping[str, OpenFile], view: memoryview, offset: int, file: str) -> None:
    while view:
        try:
            count = files[file].read_into(view, offset)
        except OSError as error:
            raise DamagedCheckpointError(
                source.place, f"{file} can't be read at byte {offset} ({error.strerror})"
            ) from error
        if count == 0:
            raise FileSizeError(source.place, f"{file} ends at byte {offset} while it is being read")
        view, offset = view[count:], offset + count


def verify_stored(source: Source, files: Mapping[str, OpenFile], stored: Mapping[str, TensorEntry]) -> None:
    """Read tensors, keep nothing of them, and see that they are what was committed.

    Args:
        source: of the checkpoint.
        files: open ones, by name.
        stored: the tensors, each in one piece, by address.

    Raises:
        DamagedCheckpointError: any of its kinds.
    """
    jobs = iter(stored.items())
    taking, stopped = threading.Lock(), Latch()
    room = min(_PART_BYTES, max((entry.bytes for entry in stored.values()), default=0))

    def work() -> None:
        scratch = memoryview(bytearray(room))
        while True:
            with taking:
                address, entry = next(jobs, ("", None))
            if entry is None:
                return
            hasher = xxhash.xxh3_128()
            for begin in range(0, entry.bytes, _PART_BYTES):
                part = scratch[: min(_PART_BYTES, entry.bytes - begin)]
                if stopped.is_open:
                    return
                _fill(source, files, part, entry.offset + begin, entry.file or "")
                hasher.update(part)
            compare(source.place, address, entry, hasher.hexdigest())

    _run_threads(work, source.read_threads, stopped.open)


def _in_parts(goals: Sequence[Goal]) -> Iterator[_Part]:
    for goal in goals:
        size = goal.stored.bytes
        for begin in range(0, size, _PART_BYTES):
            yield _Part(goal, begin, min(begin + _PART_BYTES, size))


def batches(scattered: Sequence[Scattered]) -> Iterator[list[Scattered]]:
    """Some at a time, with memory of their own; it is let go of when the next ones are asked for."""
    batch: list[Scattered] = []
    room = _SCRATCH_BYTES
    for part in scattered:
        size = part.goal.stored.bytes
        if batch and size > room:
            yield batch
            batch, room = [], _SCRATCH_BYTES
        batch.append(replace(part, goal=replace(part.goal, array=np.empty(size, dtype=np.uint8))))
        room -= size
    if batch:
        yield batch


def _view_of(array: _Bytes, outer: Box, inner: Box, itemsize: int) -> _Bytes:
    """The bytes of a box within the dense memory of one around it."""
    shape = (*outer.shape, 1)[: max(len(outer.shape), 1)]
    elements = array[: math.prod(shape) * itemsize].reshape(*shape, itemsize)
    return elements[
        tuple(slice(a - o, a - o + n) for a, o, n in zip(inner.at, outer.at, inner.shape, strict=True))
    ]


def compare(place: Place, address: str, stored: TensorEntry | Chunk, actual: str) -> None:
    """Raise if a digest is not the one that was committed."""
    if actual != stored.digest:
        chunk = f", its chunk at {list(stored.at)}" if isinstance(stored, Chunk) else ""
        raise DigestError(
            place,
            f"tensor {address!r}{chunk} in {stored.file} "
            f"(bytes {stored.offset} to {stored.offset + stored.bytes}) has the digest {actual}, "
            f"but {stored.digest} was committed: the file was changed or the disk is failing",
        )


def _run_threads(work: Callable[[], None], count: int, stop: Callable[[], None]) -> None:
    """Run `work` in several threads; raise the first real error."""
    errors = in_threads(work, count, name="keepstep-read", stop=stop)
    for error in sorted(errors, key=lambda error: isinstance(error, Aborted)):
        raise error


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The memory of a dense CPU tensor as a writable byte array."""
    array: np.ndarray[Any, np.dtype[np.uint8]] = flat_bytes(tensor).numpy()
    return array
