"""Files -> tensors: verified reads into memory that exists, or a lazy private mapping.

Every byte is covered by a digest: a tensor's data by its own, a segment's header and the order of its
tensors by the segment's, state.json and the manifest by theirs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from keepstep.checkpoint.format.hashing import Aborted, OrderedHasher
from keepstep.checkpoint.format.manifest import FileEntry, Manifest, TensorEntry, combine_digests, digest_of
from keepstep.checkpoint.format.parse import check_files, read_manifest, read_state
from keepstep.checkpoint.format.source import OpenFile, Place, Source, source_of
from keepstep.errors import (
    DamagedCheckpointError,
    DigestError,
    FileSizeError,
    ManifestError,
    MissingFileError,
)
from keepstep.tree import DTYPES

__all__ = ["Reader", "Target"]

_PART_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """Where a stored tensor's bytes go: a writable, dense byte array of just its size."""

    address: str
    array: np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class _Part:
    target: Target
    entry: TensorEntry
    begin: int
    end: int


class Reader:
    """Reads one checkpoint. Opening checks the manifest and that all files are there and whole in size.

    Raises:
        DamagedCheckpointError: any of its kinds.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._source = source_of(place)
        self.manifest: Manifest = read_manifest(place)
        check_files(place, self.manifest)

    @functools.cached_property
    def _state(self) -> tuple[Any, dict[str, TensorEntry]]:
        return read_state(self.place, self.manifest)

    @property
    def tree(self) -> Any:
        """The encoded state (see `keepstep.tree`)."""
        return self._state[0]

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The tensor index, by address."""
        return self._state[1]

    def entry(self, address: str) -> TensorEntry:
        """The index entry of a tensor that the tree refers to."""
        entry = self.tensors.get(address) if isinstance(address, str) else None
        if entry is None:
            raise ManifestError(
                self.place, f"state.json refers to the tensor {address!r:.100}, which is not indexed"
            )
        return entry

    def stored(self, address: str) -> str:
        """The address under which a tensor's bytes are stored: its own, or an alias's base."""
        return self.entry(address).alias_of or address

    # ------------------------------------------------------------------------------ verified reads

    def read_into(self, targets: Sequence[Target], *, started: set[str] | None = None) -> None:
        """Read tensors into memory, verifying in the same pass.

        Args:
            targets: stored tensors (no aliases) and where they go.
            started: receives the address of every tensor whose memory was touched.

        Raises:
            DigestError: at the first tensor whose bytes are not what was committed.
        """
        wanted = [(target, self.entry(target.address)) for target in targets]
        names = {entry.file for _, entry in wanted if entry.file is not None}
        with self._open_segments(names) as files:
            parts = _in_parts(sorted(wanted, key=lambda pair: (pair[1].file or "", pair[1].offset)))
            _Pass(self._source, files, parts, started if started is not None else set()).run()

    def fresh(self, addresses: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors into new CPU memory; aliases share their base's."""
        wanted = list(dict.fromkeys(addresses))
        bases = {base: self._empty(self.entry(base)) for base in dict.fromkeys(map(self.stored, wanted))}
        self.read_into([Target(base, bytes_of(tensor)) for base, tensor in bases.items()])
        return {address: self._seen_from(address, bases[self.stored(address)]) for address in wanted}

    @staticmethod
    def _empty(entry: TensorEntry) -> torch.Tensor:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])

    def _seen_from(self, address: str, base: torch.Tensor) -> torch.Tensor:
        """The tensor at `address`: `base` itself, or the view of it that an alias is."""
        alias = self.entry(address)
        if alias.alias_of is None or alias.stride is None:
            return base
        dtype = DTYPES[alias.dtype]
        if not math.prod(alias.shape):
            return torch.empty(alias.shape, dtype=dtype)
        data = base.reshape(-1).view(torch.uint8)[alias.offset :]
        return (
            data[: len(data) // dtype.itemsize * dtype.itemsize]
            .view(dtype)
            .as_strided(alias.shape, alias.stride)
        )

    # --------------------------------------------------------------------------------- lazy mapping

    def mapped(self, addresses: Iterable[str], *, verify: bool) -> dict[str, torch.Tensor]:
        """Tensors as a private mapping of the files: pages are read when touched, writes stay in memory.

        From a place that can't be mapped they are read whole and verified.

        Args:
            addresses: any tensors.
            verify: hash them first, in this pass over the pages.
        """
        wanted = list(dict.fromkeys(addresses))
        bases = list(dict.fromkeys(map(self.stored, wanted)))
        names = {entry.file for base in bases if (entry := self.entry(base)).file is not None}
        with self._open_segments(names) as files:
            mapped = {name: file.map() for name, file in files.items()}
        maps = {name: mapping for name, mapping in mapped.items() if mapping is not None}
        if len(maps) < len(mapped):
            return self.fresh(wanted)
        if verify:
            self._verify_mapped(bases, maps)
        tensors = {base: _tensor_in(maps, self.entry(base)) for base in bases}
        return {address: self._seen_from(address, tensors[self.stored(address)]) for address in wanted}

    def _verify_mapped(self, bases: Sequence[str], maps: Mapping[str, mmap.mmap]) -> None:
        views = {name: memoryview(mapping) for name, mapping in maps.items()}
        jobs = iter(bases)
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    address = next(jobs, None)
                if address is None:
                    return
                entry = self.entry(address)
                actual = digest_of(views[entry.file or ""][entry.offset : entry.offset + entry.bytes])
                _compare(self.place, address, entry, actual)

        _run_threads(work, self._source.read_threads)
        for view in views.values():
            view.release()

    # ------------------------------------------------------------------------------------- segments

    @contextlib.contextmanager
    def _open_segments(self, names: Iterable[str]) -> Iterator[dict[str, OpenFile]]:
        """Open segments and verify their headers; closed at the end."""
        with contextlib.ExitStack() as stack:
            files = {}
            for name in sorted(names):
                files[name] = _open(self._source, name, self.manifest.files[name])
                stack.callback(files[name].close)
                self._verify_header(name, files[name])
            yield files

    @functools.cached_property
    def _digests_by_file(self) -> dict[str, list[str]]:
        by_file: dict[str, list[str]] = {}
        stored = [entry for entry in self.tensors.values() if entry.file is not None]
        for entry in sorted(stored, key=lambda entry: (entry.offset, entry.bytes)):
            by_file.setdefault(entry.file or "", []).append(entry.digest or "")
        return by_file

    def _verify_header(self, name: str, file: OpenFile) -> None:
        entry = self.manifest.files[name]
        try:
            header = file.read(0, entry.header_bytes or 0)
        except OSError as error:
            raise DamagedCheckpointError(
                self.place, f"the header of {name} can't be read ({error.strerror})"
            ) from error
        actual = combine_digests([digest_of(header), *self._digests_by_file.get(name, ())])
        if actual != entry.digest:
            raise DigestError(
                self.place,
                f"the header of {name} (or its index) gives the digest {actual}, not {entry.digest}",
            )


# ------------------------------------------------------------------------------------------- parts


class _Pass:
    """One read of many parts by several threads, verified as it goes."""

    def __init__(
        self, source: Source, files: Mapping[str, OpenFile], parts: Iterator[_Part], started: set[str]
    ) -> None:
        self._source = source
        self._files = files
        self._parts = parts
        self._started = started
        self._take = threading.Lock()
        self._aborted = threading.Event()
        self._hasher = OrderedHasher(self._aborted)

    def run(self) -> None:
        _run_threads(self._work, self._source.read_threads)

    def _work(self) -> None:
        try:
            while not self._aborted.is_set():
                with self._take:
                    part = next(self._parts, None)
                if part is None:
                    return
                self._read(part)
        except BaseException:
            self._aborted.set()
            self._hasher.wake()
            raise

    def _read(self, part: _Part) -> None:
        entry = part.entry
        view = part.target.array.data[part.begin : part.end]
        self._started.add(part.target.address)
        self._fill(view, entry.offset + part.begin, entry.file or "")
        digest = self._hasher.feed(part.target.address, part.begin, entry.bytes, view)
        if digest is not None:
            _compare(self._source.place, part.target.address, entry, digest)

    def _fill(self, view: memoryview, offset: int, file: str) -> None:
        while view:
            try:
                count = self._files[file].read_into(view, offset)
            except OSError as error:
                raise DamagedCheckpointError(
                    self._source.place, f"{file} can't be read at byte {offset} ({error.strerror})"
                ) from error
            if count == 0:
                raise FileSizeError(
                    self._source.place, f"{file} ends at byte {offset} while it is being read"
                )
            view, offset = view[count:], offset + count


def _in_parts(wanted: Sequence[tuple[Target, TensorEntry]]) -> Iterator[_Part]:
    for target, entry in wanted:
        if entry.bytes == 0:
            continue
        for begin in range(0, entry.bytes, _PART_BYTES):
            yield _Part(target, entry, begin, min(begin + _PART_BYTES, entry.bytes))


def _compare(place: Place, address: str, entry: TensorEntry, actual: str) -> None:
    if actual != entry.digest:
        raise DigestError(
            place,
            f"tensor {address!r} in {entry.file} "
            f"(bytes {entry.offset} to {entry.offset + entry.bytes}) has the digest {actual}, "
            f"but {entry.digest} was committed: the file was changed or the disk is failing",
        )


def _run_threads(work: Any, count: int) -> None:
    """Run `work` in several threads; raise the first real error."""
    with ThreadPoolExecutor(count, thread_name_prefix="keepstep-read") as threads:
        futures = [threads.submit(work) for _ in range(count)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, Aborted)):
        raise error


def _open(source: Source, name: str, entry: FileEntry) -> OpenFile:
    """Open a file of the checkpoint and see that it has its size."""
    try:
        file = source.open(name, entry)
    except OSError as error:
        raise MissingFileError(source.place, f"the file {name} can't be opened ({error.strerror})") from error
    if not file.is_plain or file.size_bytes != entry.bytes:
        file.close()
        raise FileSizeError(
            source.place, f"{name} has {file.size_bytes} bytes, but {entry.bytes} were committed"
        )
    return file


def _tensor_in(maps: Mapping[str, mmap.mmap], entry: TensorEntry) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    flat = torch.frombuffer(maps[entry.file or ""], dtype=dtype, count=count, offset=entry.offset)
    return flat.reshape(entry.shape)


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The memory of a dense CPU tensor as a writable byte array."""
    array: np.ndarray[Any, np.dtype[np.uint8]] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array
