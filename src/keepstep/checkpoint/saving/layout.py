"""Which tensor goes into which file, and where: a pure function of names, sizes and memory.

A group (a root key of the state) becomes one segment, `model.safetensors`, or several of at most
512 MiB, `model-00001-of-00003.safetensors`, with the index file that Hugging Face loaders expect.
A segment is a safetensors file whose header is padded so that the data starts at a multiple of 4096;
tensors lie by falling element size, so that each is aligned to its elements and there are no holes.

Tensors that share memory are stored once; the others are aliases, kept in state.json.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from keepstep.checkpoint.format.manifest import DATA_ALIGNMENT_BYTES, TensorEntry

__all__ = [
    "SEGMENT_LIMIT_BYTES",
    "Alias",
    "Layout",
    "Placement",
    "Segment",
    "TensorInfo",
    "find_aliases",
    "plan",
    "segment_of",
    "tensor_entries",
]

SEGMENT_LIMIT_BYTES = 512 << 20
_HEADER_LIMIT_BYTES = 48 << 20
"""safetensors readers refuse headers of more than 100 MB."""
_HEADER_ENTRY_BYTES = 120
"""An estimate of a tensor's header entry without its name."""


class TensorInfo(NamedTuple):
    """What the layout has to know of a tensor. A tuple, since there may be a hundred thousand.

    Attributes:
        address, group, name: see `keepstep.tree.Leaf`.
        dtype: torch's name.
        shape: in elements.
        itemsize: bytes of one element.
        bytes: size when stored densely.
        memory: identity of the storage it is a view of (device and address), None if it can't be shared.
        begin: address of its first element, bytes.
        stride: in elements.
        contiguous: whether its elements lie densely in row-major order.
        frozen: whether it is a module's parameter that no gradient reaches.
    """

    address: str
    group: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    bytes: int
    memory: tuple[int, int] | None = None
    begin: int = 0
    stride: tuple[int, ...] = ()
    contiguous: bool = True
    frozen: bool = False

    @property
    def end(self) -> int:
        """Address after its last element, bytes (strides are never negative in torch)."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.begin + (last + 1) * self.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A stored tensor: `index` into the planned tensors, `offset` from the start of the file."""

    index: int
    offset: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Alias:
    """A tensor that is a view of a stored one; `offset` in bytes, `stride` in elements."""

    index: int
    base: int
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One safetensors file: its header (padded) and what follows it."""

    file: str
    header: bytes
    placements: tuple[Placement, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The plan of a checkpoint's files. `indexes` are the small `*.index.json` files."""

    segments: tuple[Segment, ...]
    aliases: tuple[Alias, ...]
    indexes: dict[str, bytes]

    @property
    def bytes(self) -> int:
        """Size of all segments."""
        return sum(segment.bytes for segment in self.segments)


def plan(
    tensors: Sequence[TensorInfo],
    labels: Sequence[int] = (),
    *,
    segment_limit_bytes: int = SEGMENT_LIMIT_BYTES,
) -> Layout:
    """Lay out a checkpoint's tensors. Deterministic: same tensors and labels, same files.

    Args:
        tensors: of the state.
        labels: one for each tensor; tensors of different labels don't share a file. All alike if empty.
        segment_limit_bytes: where a group is cut.
    """
    aliases = find_aliases(tensors)
    aliased = {alias.index for alias in aliases}
    groups: dict[str, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if index not in aliased:
            groups[tensor.group].append(index)
    segments: list[Segment] = []
    indexes: dict[str, bytes] = {}
    for stem, members in _stems(groups).items():
        parts = [
            part
            for sharing in _by_label(members, labels)
            for part in _split(sharing, tensors, segment_limit_bytes)
        ]
        names = _file_names(stem, len(parts))
        group_segments = [segment_of(name, part, tensors) for name, part in zip(names, parts, strict=True)]
        segments += group_segments
        if len(parts) > 1:
            indexes[f"{stem}.safetensors.index.json"] = _index(group_segments, tensors)
    return Layout(segments=tuple(segments), aliases=tuple(aliases), indexes=indexes)


# ---------------------------------------------------------------------------------- shared memory


def find_aliases(tensors: Sequence[TensorInfo]) -> list[Alias]:
    """Tensors that lie wholly inside the memory of another one that is stored.

    The container must be contiguous (or the very same view). Views that overlap without one holding the
    other are stored apart: their values are kept, their sharing is not.
    """
    by_memory: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.memory is not None and tensor.bytes:
            by_memory[tensor.memory].append(index)
    aliases: list[Alias] = []
    for members in by_memory.values():
        if len(members) > 1:
            aliases += _aliases_in_one_memory(members, tensors)
    return sorted(aliases, key=lambda alias: alias.index)


def _aliases_in_one_memory(members: list[int], tensors: Sequence[TensorInfo]) -> list[Alias]:
    """Sweep by address; the largest contiguous tensor at an address comes first and holds the rest."""
    order = sorted(
        members,
        key=lambda i: (tensors[i].begin, not tensors[i].contiguous, -tensors[i].end, -tensors[i].itemsize, i),
    )
    aliases: list[Alias] = []
    container: int | None = None
    scattered: dict[tuple[object, ...], int] = {}
    for index in order:
        tensor = tensors[index]
        twin = scattered.get((tensor.begin, tensor.dtype, tensor.shape, tensor.stride))
        if twin is not None:  # the same view twice; the first is stored densely
            aliases.append(Alias(index=index, base=twin, offset=0, stride=_dense_stride(tensor.shape)))
            continue
        if container is not None and tensor.end <= tensors[container].end:
            offset = tensor.begin - tensors[container].begin
            if offset % tensor.itemsize == 0:
                aliases.append(Alias(index=index, base=container, offset=offset, stride=tensor.stride))
                continue
        if tensor.contiguous:
            container = index
        else:
            scattered[tensor.begin, tensor.dtype, tensor.shape, tensor.stride] = index
    return aliases


def _dense_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


# ------------------------------------------------------------------------------------------ files


def _stems(groups: dict[str, list[int]]) -> dict[str, list[int]]:
    """File stems for groups: the group's own name where a file can have it."""
    stems: dict[str, list[int]] = {}
    taken: set[str] = set()
    for group, members in groups.items():
        stem = re.sub(r"[^A-Za-z0-9_.+=@-]", "_", group)[:120].lstrip(".+=@-") or "group"
        if re.search(r"-\d+-of-\d+\Z", stem):
            stem += "="  # or it could be the name of a part of another group
        candidate, n = stem, 1
        while candidate.lower() in taken:  # some file systems don't tell cases apart
            n += 1
            candidate = f"{stem}={n}"
        taken.add(candidate.lower())
        stems[candidate] = members
    return stems


def _by_label(members: list[int], labels: Sequence[int]) -> list[list[int]]:
    if not labels:
        return [members]
    by_label: dict[int, list[int]] = defaultdict(list)
    for index in members:
        by_label[labels[index]].append(index)
    return [by_label[label] for label in sorted(by_label)]


def _split(members: list[int], tensors: Sequence[TensorInfo], limit: int) -> list[list[int]]:
    """Cut a group where the limit is reached; a larger tensor has a segment of its own."""
    ordered = sorted(members, key=lambda index: -tensors[index].itemsize)
    parts: list[list[int]] = [[]]
    data = header = 0
    for index in ordered:
        size, entry = tensors[index].bytes, len(json.dumps(tensors[index].name)) + _HEADER_ENTRY_BYTES
        if parts[-1] and (data + size > limit or header + entry > _HEADER_LIMIT_BYTES):
            parts.append([])
            data = header = 0
        parts[-1].append(index)
        data += size
        header += entry
    return parts


def _file_names(stem: str, count: int) -> list[str]:
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


_SAFETENSORS_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_AS_PAIRS = {"complex128": "F64", "complex32": "F16"}


def _header_entry(tensor: TensorInfo, begin: int) -> str:
    """What the header says; dtypes that safetensors lacks are written as what their bytes are."""
    shape = tensor.shape
    if tensor.dtype in _AS_PAIRS:
        kind, shape = _AS_PAIRS[tensor.dtype], (*shape, 2)
    else:
        kind = _SAFETENSORS_DTYPES.get(tensor.dtype, "U8")
    name = tensor.name if tensor.name != "__metadata__" else "__metadata__~2"
    numbers, where = ",".join(map(str, shape)), f"[{begin},{begin + tensor.bytes}]"
    return f'{json.dumps(_writable(name))}:{{"dtype":"{kind}","shape":[{numbers}],"data_offsets":{where}}}'


def _writable(name: str) -> str:
    """A name that any reader of JSON takes; half a surrogate pair is written out."""
    return name.encode("utf-8", "backslashreplace").decode()


def segment_of(file: str, members: Iterable[int], tensors: Sequence[TensorInfo]) -> Segment:
    """A segment of these tensors, by their numbers, in this order."""
    # Text, not nested objects: with a hundred thousand tensors the garbage collector would feel them.
    entries = ['"__metadata__":{"format":"pt"}']
    placements: list[tuple[int, int, int]] = []
    position = 0
    for index in members:
        tensor = tensors[index]
        entries.append(_header_entry(tensor, position))
        placements.append((index, position, tensor.bytes))
        position += tensor.bytes
    text = f"{{{','.join(entries)}}}".encode()
    padded = -(len(text) + 8) % DATA_ALIGNMENT_BYTES + len(text)
    data = padded.to_bytes(8, "little") + text.ljust(padded)
    return Segment(
        file=file,
        header=data,
        placements=tuple(
            Placement(index=index, offset=len(data) + begin, bytes=size) for index, begin, size in placements
        ),
        bytes=len(data) + position,
    )


def _index(segments: Sequence[Segment], tensors: Sequence[TensorInfo]) -> bytes:
    placed = [(segment.file, tensors[p.index].name) for segment in segments for p in segment.placements]
    weight_map = {_writable(name): file for file, name in placed}
    total = sum(p.bytes for segment in segments for p in segment.placements)
    body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(body, indent=1).encode() + b"\n"


def tensor_entries(
    infos: Sequence[TensorInfo], layout: Layout, digests: Mapping[int, str]
) -> dict[str, TensorEntry]:
    """The index of what was laid out, by address, once the digests are known."""
    entries: dict[int, TensorEntry] = {}
    for segment in layout.segments:
        for placed in segment.placements:
            info = infos[placed.index]
            entries[placed.index] = TensorEntry(
                dtype=info.dtype,
                shape=info.shape,
                offset=placed.offset,
                file=segment.file,
                bytes=placed.bytes,
                digest=digests[placed.index],
            )
    for alias in layout.aliases:
        info = infos[alias.index]
        entries[alias.index] = TensorEntry(
            dtype=info.dtype,
            shape=info.shape,
            offset=alias.offset,
            alias_of=infos[alias.base].address,
            stride=alias.stride,
        )
    return {infos[index].address: entries[index] for index in sorted(entries)}
