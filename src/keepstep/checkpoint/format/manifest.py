"""The format on disk as frozen dataclasses: `manifest.json` and the tensor index in `state.json`.

No torch here. `parse.py` reads what this module writes; docs/format.md is the specification.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple

import xxhash

__all__ = [
    "BLANK_DIGEST",
    "CHECKPOINT_NAME",
    "DATA_ALIGNMENT_BYTES",
    "ITEMSIZES",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "STATE_NAME",
    "WITHIN",
    "Chunk",
    "FileEntry",
    "Manifest",
    "TensorEntry",
    "combine_digests",
    "digest_of",
    "dump_manifest",
    "dump_state",
    "stored_parts",
]

SCHEMA_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
STATE_NAME: Final = "state.json"
DATA_ALIGNMENT_BYTES: Final = 4096

CHECKPOINT_NAME: Final = re.compile(r"checkpoint_([0-9]{1,18})\Z")
"""Its number, with leading zeros or without."""

WITHIN: Final = re.compile(r"(checkpoint_[0-9]{1,18}|attempt_[0-9a-f]{16})\Z")
"""Where else an object of a checkpoint in a bucket may lie: in another one beside it, or further inside."""

BLANK_DIGEST = "0" * 32

ITEMSIZES = {
    "bool": 1,
    "bfloat16": 2,
    "float4_e2m1fn_x2": 1,
    **{
        f"{sign}int{bits}": max(1, bits // 8)
        for sign in ("", "u")
        for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)
    },
    **{f"float{bits}": bits // 8 for bits in (16, 32, 64)},
    **{f"complex{bits}": bits // 8 for bits in (32, 64, 128)},
    **{f"float8_{kind}": 1 for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")},
}


def digest_of(data: bytes | memoryview) -> str:
    """xxh3_128 of `data`, 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def combine_digests(digests: Iterable[str]) -> str:
    """The digest of a segment: xxh3_128 over the raw digests of its header and tensors, in file order."""
    return xxhash.xxh3_128_hexdigest(b"".join(bytes.fromhex(digest) for digest in digests))


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of a checkpoint.

    Attributes:
        bytes: its size.
        digest: of the whole file; for a segment `combine_digests` over header and tensors.
        header_bytes: a segment's safetensors header with its length field, a multiple of 4096; else None.
        within: in a bucket, the checkpoint of the same store whose object of that name holds the bytes, or
            the attempt at this one that has written it ("attempt_" and 16 hex digits); None if it lies
            beside the manifest.
    """

    bytes: int
    digest: str
    header_bytes: int | None = None
    within: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        id: unique for ever.
        created_at: ISO 8601, UTC.
        step: optimizer steps done, or None.
        epoch: the epoch under way, or None.
        metrics: name -> number, str or bool; NaN and infinities included.
        tags: names given by the user; a tagged checkpoint is never pruned.
        pinned: never pruned.
        parent: id of the checkpoint that was saved or loaded before this one in the same run.
        run: id of the run, kept over restarts.
        attempt: 1 for the first process of the run, 2 after the first resume ...
        environment: versions, host, command line, git commit.
        files: name -> entry; every file but the manifest.
        directories: names of empty directories that the user handed over; files say where the others are.
    """

    id: str
    created_at: str
    step: int | None
    epoch: int | None
    metrics: Mapping[str, float | int | str | bool]
    tags: tuple[str, ...]
    pinned: bool
    parent: str | None
    run: str
    attempt: int
    environment: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    directories: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Size of all files but the manifest."""
        return sum(entry.bytes for entry in self.files.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A box of a sharded tensor, its elements stored densely.

    Attributes:
        at: where the box begins, one index for each dimension of the tensor.
        shape: of the box.
        file: the segment that holds it.
        offset: from the start of the file, bytes.
        bytes: its size.
        digest: of its bytes.
    """

    at: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    bytes: int
    digest: str


class TensorEntry(NamedTuple):
    """Where one tensor's bytes lie. A tuple, since they are made anew for each save.

    A stored tensor has `file`, `offset` (from the start of the file), `bytes` and `digest`. An alias
    has `alias_of` (the address of a stored tensor), `stride` in elements and `offset` in bytes from the
    start of that tensor. A sharded tensor has `chunks`, and `bytes` of all of them.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    file: str | None = None
    bytes: int = 0
    digest: str | None = None
    alias_of: str | None = None
    stride: tuple[int, ...] | None = None
    chunks: tuple[Chunk, ...] = ()


def stored_parts(entry: TensorEntry) -> tuple[TensorEntry | Chunk, ...]:
    """What of a tensor lies in files, each a range with a digest: itself, its chunks, nothing if an alias."""
    if entry.chunks:
        return entry.chunks
    return () if entry.file is None else (entry,)


# ------------------------------------------------------------------------------------------ write


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json, its own digest in the last member."""
    body: dict[str, Any] = {"format": "keepstep", "schema": SCHEMA_VERSION, **_members(manifest)}
    body["metrics"] = {name: _metric_to_json(value) for name, value in manifest.metrics.items()}
    body["files"] = {
        name: {key: value for key, value in _members(entry).items() if value is not None}
        for name, entry in manifest.files.items()
    }
    if not manifest.directories:
        del body["directories"]
    body["self_digest"] = BLANK_DIGEST
    text = json.dumps(body, indent=1, allow_nan=False).encode() + b"\n"
    begin = text.rindex(BLANK_DIGEST.encode())
    return text[:begin] + digest_of(text).encode() + text[begin + len(BLANK_DIGEST) :]


def _members(said: Manifest | FileEntry) -> dict[str, Any]:
    """By name, in the order of the format; not copied, as `asdict` would."""
    return {member.name: getattr(said, member.name) for member in fields(said)}


def _metric_to_json(value: float | int | str | bool) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    return value


def dump_state(tree: Any, tensors: Mapping[str, TensorEntry], ranks: Sequence[Any] | None = None) -> bytes:
    """The bytes of state.json: the tensor index, the tree, and each rank's own tree if there are such."""
    # The index as text: the garbage collector would feel the objects of a hundred thousand tensors.
    index = ",".join(f"{_quoted(address)}:{_tensor_to_json(entry)}" for address, entry in tensors.items())
    encoded = json.dumps(tree, separators=(",", ":"), allow_nan=False)
    own = "" if ranks is None else f',"ranks":{json.dumps(ranks, separators=(",", ":"), allow_nan=False)}'
    return f'{{"schema":{SCHEMA_VERSION},"tensors":{{{index}}},"tree":{encoded}{own}}}\n'.encode()


_quoted: Final = json.JSONEncoder().encode  # json.dumps takes five times as long to come to it


def _tensor_to_json(entry: TensorEntry) -> str:
    if entry.chunks:
        chunks = ",".join(map(_chunk_to_json, entry.chunks))
        return f'{{"dtype":"{entry.dtype}","shape":{_whole_numbers(entry.shape)},"chunks":[{chunks}]}}'
    node = f'{{"dtype":"{entry.dtype}","shape":{_whole_numbers(entry.shape)},"offset":{entry.offset},'
    if entry.alias_of is not None:
        return f'{node}"alias_of":{_quoted(entry.alias_of)},"stride":{_whole_numbers(entry.stride or ())}}}'
    return f'{node}"file":"{entry.file}","bytes":{entry.bytes},"digest":"{entry.digest}"}}'


def _chunk_to_json(chunk: Chunk) -> str:
    box = f'"at":{_whole_numbers(chunk.at)},"shape":{_whole_numbers(chunk.shape)},"offset":{chunk.offset}'
    return f'{{{box},"file":"{chunk.file}","bytes":{chunk.bytes},"digest":"{chunk.digest}"}}'


def _whole_numbers(values: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, values))}]"
