"""Reading `manifest.json` and `state.json`. Trusts nothing; no torch.

Every value is checked for type and range before it is used, so that a mangled or hostile file ends in a
`DamagedCheckpointError` and never in a wrong state, a path outside the directory or an allocation of a
made-up size.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from keepstep.checkpoint.format.boxes import Box, problem_of_tiling
from keepstep.checkpoint.format.manifest import (
    BLANK_DIGEST,
    ITEMSIZES,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    STATE_NAME,
    WITHIN,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    digest_of,
    stored_parts,
)
from keepstep.checkpoint.format.names import (
    HANDED_OVER,
    directories_within,
    is_handed_over,
    problem_of_name,
)
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.errors import DigestError, FileSizeError, ManifestError, SchemaVersionError

__all__ = ["State", "check_files", "parse_state", "read_manifest", "read_state"]

_MAX_MANIFEST_BYTES = 64 << 20
_MAX_BYTES = 1 << 62
_SELF_DIGEST = re.compile(rb'"self_digest": "([0-9a-f]{32})"\n?\}\n?\Z')
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


class State(NamedTuple):
    """What state.json says: the tree, the tensor index by address, each rank's own tree (may be none)."""

    tree: Any
    tensors: dict[str, TensorEntry]
    ranks: list[Any]


class _Checker:
    """Turns untrusted JSON into checked values, with the place of the first thing wrong."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = place
        self.name = name

    def fail(self, what: str) -> ManifestError:
        return ManifestError(
            self.place, f"{self.name}: {what}; restore the file from a copy or use another checkpoint"
        )

    def need(self, node: Mapping[str, Any], key: str, kinds: type | tuple[type, ...]) -> Any:
        if key not in node:
            raise self.fail(f"the member {key!r} is missing")
        value = node[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds in (int, (int, type(None)))):
            raise self.fail(f"{key!r} is {value!r:.100}, which is a {type(value).__name__}")
        return value

    def size(self, node: Mapping[str, Any], key: str) -> int:
        value = self.need(node, key, int)
        if not 0 <= value <= _MAX_BYTES:
            raise self.fail(f"{key!r} is {value}; allowed: 0 to 2**62")
        return int(value)

    def digest(self, node: Mapping[str, Any], key: str) -> str:
        value = self.need(node, key, str)
        if not _DIGEST.match(value):
            raise self.fail(f"{key!r} is {value!r:.100}; expected 32 hex digits")
        return str(value)

    def within(self, node: Mapping[str, Any], key: str) -> str:
        value = self.need(node, key, str)
        if not WITHIN.match(value):
            raise self.fail(f"{key!r} is {value!r:.100}; expected a name as checkpoint_12")
        return str(value)

    @contextlib.contextmanager
    def depth(self) -> Iterator[None]:
        """What just fits the JSON parser may be too deep for what looks at it."""
        try:
            yield
        except RecursionError:
            raise self.fail("it is nested too deep") from None

    def load(self, data: bytes) -> dict[str, Any]:
        try:
            node = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.fail(f"not valid JSON ({error!s:.200})") from error
        if not isinstance(node, dict):
            raise self.fail(f"expected a JSON object, found a {type(node).__name__}")
        return node

    def schema(self, node: Mapping[str, Any]) -> None:
        schema = self.need(node, "schema", int)
        if schema > SCHEMA_VERSION:
            raise SchemaVersionError(
                self.place,
                f"{self.name} has schema version {schema}; this keepstep reads up to {SCHEMA_VERSION}: "
                "upgrade keepstep",
            )
        if schema < 1:
            raise self.fail(f"schema version {schema}; allowed: 1 to {SCHEMA_VERSION}")


def read_manifest(place: Place) -> Manifest:
    """Read and check a checkpoint's `manifest.json`.

    Raises:
        ManifestError: missing, mangled or hostile.
        SchemaVersionError: written by a newer keepstep.
        DigestError: its own digest does not match.
    """
    data = source_of(place).read_small(MANIFEST_NAME, _MAX_MANIFEST_BYTES)
    check = _Checker(place, MANIFEST_NAME)
    with check.depth():
        return _parse_manifest(data, check)


def _parse_manifest(data: bytes, check: _Checker) -> Manifest:
    node = check.load(data)
    if node.get("format") != "keepstep":
        raise check.fail(f"'format' is {node.get('format')!r:.100}, expected 'keepstep'")
    _check_self_digest(data, check)  # first: a flipped bit must not read as a newer version
    check.schema(node)
    files = _parse_files(node, check)
    return Manifest(
        id=check.need(node, "id", str),
        created_at=check.need(node, "created_at", str),
        step=check.need(node, "step", (int, type(None))),
        epoch=check.need(node, "epoch", (int, type(None))),
        metrics=_parse_metrics(node, check),
        tags=_parse_tags(node, check),
        pinned=check.need(node, "pinned", bool),
        parent=check.need(node, "parent", (str, type(None))),
        run=check.need(node, "run", str),
        attempt=check.size(node, "attempt"),
        environment=check.need(node, "environment", dict),
        files=files,
        directories=_parse_directories(node, files, check),
    )


def _check_self_digest(data: bytes, check: _Checker) -> None:
    found = _SELF_DIGEST.search(data)
    if found is None:
        raise check.fail("it does not end with its 'self_digest'")
    blanked = data[: found.start(1)] + BLANK_DIGEST.encode() + data[found.end(1) :]
    actual = digest_of(blanked)
    if actual != found[1].decode():
        raise DigestError(
            check.place,
            f"{MANIFEST_NAME} says its digest is {found[1].decode()}, but it is {actual}: it was changed",
        )


def _parse_metrics(node: Mapping[str, Any], check: _Checker) -> dict[str, float | int | str | bool]:
    metrics: dict[str, float | int | str | bool] = {}
    for name, value in check.need(node, "metrics", dict).items():
        if value in ({"$float": "nan"}, {"$float": "inf"}, {"$float": "-inf"}):
            value = float(value["$float"])
        if not isinstance(value, float | int | str | bool):
            raise check.fail(f"metric {name!r} is {value!r:.100}; allowed: a number, string or boolean")
        metrics[name] = value
    return metrics


def _parse_tags(node: Mapping[str, Any], check: _Checker) -> tuple[str, ...]:
    tags = check.need(node, "tags", list)
    if not all(isinstance(tag, str) for tag in tags):
        raise check.fail(f"'tags' is {tags!r:.100}; expected a list of strings")
    return tuple(tags)


def _parse_files(node: Mapping[str, Any], check: _Checker) -> dict[str, FileEntry]:
    files: dict[str, FileEntry] = {}
    for name, entry in check.need(node, "files", dict).items():
        problem = "it is the manifest's own" if name == MANIFEST_NAME else problem_of_name(name)
        if problem is not None:
            raise check.fail(f"the file name {name!r:.100} is not allowed: {problem}")
        if not isinstance(entry, dict):
            raise check.fail(f"the entry of {name!r} is a {type(entry).__name__}")
        header_bytes = check.size(entry, "header_bytes") if "header_bytes" in entry else None
        files[name] = FileEntry(
            bytes=check.size(entry, "bytes"),
            digest=check.digest(entry, "digest"),
            header_bytes=header_bytes,
            within=check.within(entry, "within") if "within" in entry else None,
        )
        if header_bytes is not None and is_handed_over(name):
            raise check.fail(f"{name!r:.100} is a segment, but lies below files/")
        if header_bytes is not None and (header_bytes > files[name].bytes or header_bytes < 8):
            raise check.fail(
                f"'header_bytes' of {name!r} is {header_bytes} in a file of {files[name].bytes} bytes"
            )
    if STATE_NAME not in files and not all(map(is_handed_over, files)):
        raise check.fail(f"'files' does not name {STATE_NAME}")
    return files


def _parse_directories(
    node: Mapping[str, Any], files: Mapping[str, FileEntry], check: _Checker
) -> tuple[str, ...]:
    """Empty directories; and no file may lie where a directory has to be."""
    names = check.need(node, "directories", list) if "directories" in node else []
    for name in names:
        problem = "a string is expected" if not isinstance(name, str) else None
        if problem is None and name != HANDED_OVER:
            problem = problem_of_name(name) if is_handed_over(name) else "it does not lie below files/"
        if problem is not None:
            raise check.fail(f"the directory {name!r:.100} is not allowed: {problem}")
    both = files.keys() & set(directories_within(files, names))
    if both:
        raise check.fail(f"{min(both)!r:.100} is a file and a directory")
    if STATE_NAME not in files and not files and not names:
        raise check.fail("it names no file")
    return tuple(names)


def check_files(place: Place, manifest: Manifest) -> None:
    """See that every file is there, a plain file, and of the committed size. Reads no content.

    Raises:
        MissingFileError, FileSizeError, ManifestError: naming the file.
    """
    source_of(place).check_files(manifest.files)


def read_state(place: Place, manifest: Manifest) -> State:
    """Read, verify and check state.json; an empty state if the checkpoint has none, but the user's files.

    Raises:
        DamagedCheckpointError: any of its kinds.
    """
    entry = manifest.files.get(STATE_NAME)
    if entry is None:
        return State(tree=None, tensors={}, ranks=[])
    data = source_of(place).read_small(STATE_NAME, entry.bytes, entry.within)
    if len(data) != entry.bytes:
        raise FileSizeError(place, f"{STATE_NAME} has {len(data)} bytes, but {entry.bytes} were committed")
    if (actual := digest_of(data)) != entry.digest:
        raise DigestError(place, f"{STATE_NAME} has the digest {actual}, but {entry.digest} was committed")
    return parse_state(place, data, manifest)


def parse_state(place: Place, data: bytes, manifest: Manifest) -> State:
    """Check the content of state.json against the manifest; see `read_state`."""
    check = _Checker(place, STATE_NAME)
    with check.depth():
        return _parse_state(data, manifest, check)


def _parse_state(data: bytes, manifest: Manifest, check: _Checker) -> State:
    node = check.load(data)
    check.schema(node)
    if "tree" not in node:
        raise check.fail("the member 'tree' is missing")
    tensors = {
        address: _parse_tensor(address, entry, check)
        for address, entry in check.need(node, "tensors", dict).items()
    }
    _check_coverage(tensors, manifest, check)
    _check_aliases(tensors, check)
    ranks = check.need(node, "ranks", list) if "ranks" in node else []
    return State(tree=node["tree"], tensors=tensors, ranks=ranks)


def _parse_tensor(address: str, node: Any, check: _Checker) -> TensorEntry:
    if not isinstance(node, dict):
        raise check.fail(f"the entry of tensor {address!r} is a {type(node).__name__}")
    dtype = node.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise check.fail(f"tensor {address!r} has the unknown dtype {dtype!r:.100}")
    shape = _parse_dimensions(node, "shape", address, check)
    if "chunks" in node:
        return _parse_sharded(address, node, dtype, shape, check)
    offset = check.size(node, "offset")
    if "alias_of" in node:
        stride = _parse_dimensions(node, "stride", address, check)
        if len(stride) != len(shape):
            raise check.fail(f"alias {address!r} has {len(shape)} dimensions and {len(stride)} strides")
        return TensorEntry(
            dtype=dtype, shape=shape, offset=offset, alias_of=check.need(node, "alias_of", str), stride=stride
        )
    size = check.size(node, "bytes")
    if math.prod(shape) * ITEMSIZES[dtype] != size:
        raise check.fail(
            f"tensor {address!r} of shape {list(shape)} and dtype {dtype} can't have {size} bytes"
        )
    return TensorEntry(
        dtype=dtype,
        shape=shape,
        offset=offset,
        file=check.need(node, "file", str),
        bytes=size,
        digest=check.digest(node, "digest"),
    )


def _parse_sharded(
    address: str, node: Mapping[str, Any], dtype: str, shape: tuple[int, ...], check: _Checker
) -> TensorEntry:
    chunks = tuple(_parse_chunk(address, part, dtype, check) for part in check.need(node, "chunks", list))
    problem = problem_of_tiling(shape, [Box(chunk.at, chunk.shape) for chunk in chunks])
    if problem is not None or not chunks:
        raise check.fail(f"the sharded tensor {address!r} is not whole: {problem or 'it has no chunks'}")
    size = math.prod(shape) * ITEMSIZES[dtype]
    return TensorEntry(dtype=dtype, shape=shape, offset=0, bytes=size, chunks=chunks)


def _parse_chunk(address: str, node: Any, dtype: str, check: _Checker) -> Chunk:
    if not isinstance(node, dict):
        raise check.fail(f"a chunk of tensor {address!r} is a {type(node).__name__}")
    shape, size = _parse_dimensions(node, "shape", address, check), check.size(node, "bytes")
    if math.prod(shape) * ITEMSIZES[dtype] != size:
        raise check.fail(
            f"a chunk of tensor {address!r} of shape {list(shape)} and dtype {dtype} can't have {size} bytes"
        )
    return Chunk(
        at=_parse_dimensions(node, "at", address, check),
        shape=shape,
        file=check.need(node, "file", str),
        offset=check.size(node, "offset"),
        bytes=size,
        digest=check.digest(node, "digest"),
    )


def _parse_dimensions(node: Mapping[str, Any], key: str, address: str, check: _Checker) -> tuple[int, ...]:
    values = check.need(node, key, list)
    whole = len(values) <= 64 and all(type(value) is int and 0 <= value <= _MAX_BYTES for value in values)
    if not whole or math.prod(max(value, 1) for value in values) > _MAX_BYTES:
        raise check.fail(
            f"{key!r} of tensor {address!r} is {values!r:.100}; expected whole numbers from 0 to 2**62"
        )
    return tuple(values)


def _check_coverage(tensors: Mapping[str, TensorEntry], manifest: Manifest, check: _Checker) -> None:
    """Stored tensors tile each segment's data exactly: no overlap, no hole, nothing outside."""
    by_file: dict[str, list[tuple[int, int, str]]] = {
        name: [] for name, entry in manifest.files.items() if entry.header_bytes is not None
    }
    for address, tensor in tensors.items():
        for part in stored_parts(tensor):
            if part.file not in by_file:
                raise check.fail(
                    f"tensor {address!r} lies in {part.file!r:.100}, which is no segment of this checkpoint"
                )
            by_file[part.file].append((part.offset, part.offset + part.bytes, address))
    for name, ranges in by_file.items():
        position = manifest.files[name].header_bytes or 0
        for begin, end, address in sorted(ranges):
            if begin != position:
                kind = "overlaps the one before it" if begin < position else "leaves a hole before it"
                raise check.fail(
                    f"tensor {address!r} at {begin} in {name} {kind} (expected offset {position})"
                )
            position = end
        if position != manifest.files[name].bytes:
            raise check.fail(
                f"the tensors in {name} end at {position}, the file at {manifest.files[name].bytes}"
            )


def _check_aliases(tensors: Mapping[str, TensorEntry], check: _Checker) -> None:
    for address, alias in tensors.items():
        if alias.alias_of is None or alias.stride is None:
            continue
        base = tensors.get(alias.alias_of)
        if base is None or base.file is None:
            raise check.fail(
                f"alias {address!r} points to {alias.alias_of!r:.100}, which is no stored tensor"
            )
        itemsize = ITEMSIZES[alias.dtype]
        last = sum((size - 1) * step for size, step in zip(alias.shape, alias.stride, strict=True))
        end = alias.offset + (last + 1) * itemsize if math.prod(alias.shape) else alias.offset
        if end > base.bytes or alias.offset % itemsize:
            raise check.fail(
                f"alias {address!r} reaches from {alias.offset} to {end} in a tensor of {base.bytes} bytes"
            )
