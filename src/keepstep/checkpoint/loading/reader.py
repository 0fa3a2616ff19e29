"""Files -> tensors: verified reads into memory that exists, or a lazy private mapping.

Every byte is covered by a digest: a tensor's data by its own, a segment's header and the order of its
tensors by the segment's, state.json and the manifest by theirs.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch

from keepstep.checkpoint.format.manifest import (
    STATE_NAME,
    FileEntry,
    Manifest,
    TensorEntry,
    combine_digests,
    digest_of,
    stored_parts,
)
from keepstep.checkpoint.format.names import HANDED_OVER
from keepstep.checkpoint.format.parse import State, check_files, read_manifest, read_state
from keepstep.checkpoint.format.source import OpenFile, Place, Source, source_of
from keepstep.checkpoint.loading.passes import (
    Goal,
    Pass,
    Scattered,
    Target,
    batches,
    bytes_of,
    part_target,
    verify_stored,
)
from keepstep.errors import (
    DamagedCheckpointError,
    DigestError,
    FileSizeError,
    ManifestError,
    MissingFileError,
    UsageError,
)
from keepstep.tree import DTYPES

__all__ = ["Reader", "over_untrusted"]

_MOST_OPEN: Final = 256
"""Segments that are open at once."""
_OPEN_ELSEWHERE: Final = 128
"""Files that the rest of the process may have open."""


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
    def _state(self) -> State:
        if STATE_NAME not in self.manifest.files:
            raise UsageError(
                f"{self.place} holds no state: it was made of a directory. Its files are in "
                f"{self.place}/{HANDED_OVER}"
            )
        return read_state(self.place, self.manifest)

    @property
    def tree(self) -> Any:
        """The encoded state (see `keepstep.tree`)."""
        return self._state.tree

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """The tensor index, by address."""
        return self._state.tensors

    @property
    def ranks(self) -> Sequence[Any]:
        """The encoded state of each rank's own, by rank; empty if there was none."""
        return self._state.ranks

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
        goals: list[Goal] = []
        scattered: list[Scattered] = []
        for target in targets:
            entry = self.entry(target.address)
            if target.box is None and not entry.chunks:
                goals.append(Goal(target.address, entry, target.array))
            else:
                part_target(target, entry, goals, scattered)
        begun = started if started is not None else set()
        names = {goal.stored.file for goal in goals} | {part.goal.stored.file for part in scattered}
        groups = _some_at_once(name for name in names if name is not None)
        for group in groups if len(groups) > 1 else ():  # all headers before any memory is touched
            with self._open_segments(group):
                pass
        for group in groups:
            with self._open_segments(group) as files:
                Pass(self._source, files, [g for g in goals if g.stored.file in files], begun).run()
                for batch in batches([part for part in scattered if part.goal.stored.file in files]):
                    Pass(self._source, files, [part.goal for part in batch], begun).run()
                    for part in batch:
                        part.copy()

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

        From a place that can't be mapped they are read whole and verified; so are sharded ones, anywhere, and
        all of them if they lie in more files than this process may have open.

        Args:
            addresses: any tensors.
            verify: hash them first. They are read for it, since a disk that fails under a mapping kills.
        """
        wanted = list(dict.fromkeys(addresses))
        bases = [base for base in dict.fromkeys(map(self.stored, wanted)) if not self.entry(base).chunks]
        names = {entry.file for base in bases if (entry := self.entry(base)).file is not None}
        if len(names) > _most_mapped():
            return self.fresh(wanted)
        with self._open_segments(names) as files:
            mapped = {name: file.map() for name, file in files.items()}
            maps = {name: mapping for name, mapping in mapped.items() if mapping is not None}
            if verify and len(maps) == len(mapped):
                verify_stored(self._source, files, {base: self.entry(base) for base in bases})
        if len(maps) < len(mapped):
            return self.fresh(wanted)
        tensors = {base: _tensor_in(maps, self.entry(base)) for base in bases}
        tensors.update(self.fresh(address for address in wanted if self.entry(address).chunks))
        return {address: self._seen_from(address, tensors[self.stored(address)]) for address in wanted}

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
        stored = [part for entry in self.tensors.values() for part in stored_parts(entry)]
        for part in sorted(stored, key=lambda part: (part.offset, part.bytes)):
            by_file.setdefault(part.file or "", []).append(part.digest or "")
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


def _some_at_once(names: Iterable[str]) -> list[list[str]]:
    """Files in groups that may be open at once: many ranks have saved more than a process may open."""
    ordered = sorted(names)
    return [ordered[begin : begin + _MOST_OPEN] for begin in range(0, len(ordered), _MOST_OPEN)]


def _most_mapped() -> float:
    """Files that can be mapped: until all are, each is open twice, and the process has others."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if allowed == resource.RLIM_INFINITY else (allowed - _OPEN_ELSEWHERE) // 2


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


def over_untrusted(reader: Reader, work: Callable[[], Any]) -> Any:
    """Run code over the untrusted tree; what it can't read is a damaged manifest."""
    try:
        return work()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if type(error) in {ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError}:
            raise ManifestError(reader.place, f"state.json: {error}") from error
        raise
