"""Is every byte of a checkpoint what was committed? No torch: any machine can answer."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, MutableSet
from dataclasses import dataclass

import xxhash

from keepstep.checkpoint.format.manifest import (
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    combine_digests,
    digest_of,
    stored_parts,
)
from keepstep.checkpoint.format.parse import check_files, read_manifest, read_state
from keepstep.checkpoint.format.source import OpenFile, Place, Source, source_of
from keepstep.checkpoint.keeping.refusal import is_refusal
from keepstep.errors import DamagedCheckpointError, DigestError, ManifestError

__all__ = ["FileState", "Report", "verify_checkpoint"]

_CHUNK_BYTES = 8 << 20
_Stored = tuple[str, TensorEntry | Chunk]
"""A range of bytes in a segment, and the address of the tensor it belongs to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The health of one checkpoint.

    Attributes:
        path: the directory, or where else the checkpoint lies.
        problems: one sentence for each thing wrong; empty if it is sound.
        bytes: how many bytes were hashed.
        refused: the system did not let us look (permission, open files): that says nothing of the bytes.
    """

    path: Place
    problems: tuple[str, ...]
    bytes: int
    refused: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


FileState = tuple[Hashable, str]
"""A file that was hashed: what tells it apart where it lies, and the digest that was committed."""


def verify_checkpoint(
    place: Place,
    *,
    quick: bool = False,
    progress: Callable[[int], None] = lambda _: None,
    known: MutableSet[FileState] | None = None,
) -> Report:
    """Verify one checkpoint; never raises for damage, reports all of it.

    Args:
        place: the checkpoint.
        quick: only the manifest, state.json, and every file's presence and size; no data is read.
        progress: called with the number of bytes hashed since the last call.
        known: these files are passed over, and sound ones are added: what several checkpoints share
            is read once. What is read does not stay in the system's cache then.
    """
    problems: list[str] = []
    hashed, refused = 0, False
    try:
        manifest = read_manifest(place)
        check_files(place, manifest)
        tensors = read_state(place, manifest).tensors
        if not quick:
            for problem, count in _verify_files(source_of(place), manifest, tensors, known):
                problems += [problem] if problem else []
                hashed += count
                progress(count)
    except DamagedCheckpointError as error:
        refused = is_refusal(error) and not problems  # what is known to be damaged stays so
        problems.append(error.message)
    except OSError as error:
        refused = is_refusal(error) and not problems
        problems.append(f"can't be read: {error.strerror or error} ({error.filename})")
    return Report(path=place, problems=tuple(problems), bytes=hashed, refused=refused)


def _verify_files(
    source: Source,
    manifest: Manifest,
    tensors: dict[str, TensorEntry],
    known: MutableSet[FileState] | None,
) -> Iterator[tuple[str | None, int]]:
    """Problems found and bytes hashed, as it goes."""
    inside: dict[str, list[_Stored]] = defaultdict(list)
    for address, tensor in tensors.items():
        for part in stored_parts(tensor):
            inside[part.file or ""].append((address, part))
    for name, entry in manifest.files.items():
        file = source.open(name, entry)
        try:
            states = {(identity, entry.digest) for identity in source.held({name: entry})}
            if known is not None and states <= known:
                continue
            sound = True
            for problem, count in _verify_file(source, file, name, entry, inside[name]):
                sound = sound and problem is None
                yield problem, count
                if known is not None:
                    file.forget_cached()
            if known is not None and sound:
                known |= states
        finally:
            file.close()


def _verify_file(
    source: Source, file: OpenFile, name: str, entry: FileEntry, inside: list[_Stored]
) -> Iterator[tuple[str | None, int]]:
    if entry.header_bytes is None:
        yield from _verify_plain(file, name, entry)
        return
    inside.sort(key=lambda pair: (pair[1].offset, pair[1].bytes))
    yield from _verify_segment(source.place, file, name, entry, inside)


def _verify_plain(file: OpenFile, name: str, entry: FileEntry) -> Iterator[tuple[str | None, int]]:
    hasher = xxhash.xxh3_128()
    for begin in range(0, entry.bytes, _CHUNK_BYTES):
        chunk = _exactly(file, begin, min(_CHUNK_BYTES, entry.bytes - begin))
        hasher.update(chunk)
        yield None, len(chunk)
    if (actual := hasher.hexdigest()) != entry.digest:
        yield f"{name} has the digest {actual}, but {entry.digest} was committed", 0


def _verify_segment(
    place: Place, file: OpenFile, name: str, entry: FileEntry, inside: list[_Stored]
) -> Iterator[tuple[str | None, int]]:
    header = _exactly(file, 0, entry.header_bytes or 0)
    committed = [digest_of(header), *(tensor.digest or "" for _, tensor in inside)]
    if combine_digests(committed) != entry.digest:
        yield f"the header of {name} was changed", len(header)
    else:
        yield _header_problem(header, name, inside), len(header)
    for address, tensor in inside:
        hasher = xxhash.xxh3_128()
        for begin in range(tensor.offset, tensor.offset + tensor.bytes, _CHUNK_BYTES):
            chunk = _exactly(file, begin, min(_CHUNK_BYTES, tensor.offset + tensor.bytes - begin))
            hasher.update(chunk)
            yield None, len(chunk)
        if hasher.hexdigest() != tensor.digest:
            error = DigestError(place, f"tensor {address!r} in {name} was changed: its digest differs")
            yield error.message, 0


def _header_problem(header: bytes, name: str, inside: list[_Stored]) -> str | None:
    """The safetensors header, which other tools read, must say the same as the index that we read."""
    try:
        entries = json.loads(header[8:])
        said = sorted(entry["data_offsets"] for key, entry in entries.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"the header of {name} is no safetensors header ({error})"
    indexed = sorted([t.offset - len(header), t.offset - len(header) + t.bytes] for _, t in inside)
    return None if said == indexed else f"the header of {name} places tensors elsewhere than state.json does"


def _exactly(file: OpenFile, offset: int, size: int) -> bytes:
    data = file.read(offset, size)
    while len(data) < size:
        more = file.read(offset + len(data), size - len(data))
        if not more:
            raise ManifestError("", f"a file ended at byte {offset + len(data)} while it was being read")
        data += more
    return data
