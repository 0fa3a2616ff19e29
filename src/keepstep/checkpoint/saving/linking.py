"""Which segments of the last checkpoint a new one may be made of: a pure function of plan and index."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keepstep.checkpoint.format.manifest import FileEntry, TensorEntry, combine_digests, digest_of
from keepstep.checkpoint.saving.layout import Layout, Segment, TensorInfo

__all__ = ["LINKED_FROM_BYTES", "Previous", "Twin", "find_twins"]

LINKED_FROM_BYTES = 1 << 20
"""Smaller segments are written each time: checkpoints that share nothing can't be damaged together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Previous:
    """The committed checkpoint before this one, which unchanged segments are linked to.

    Attributes:
        checkpoint: its name in the store.
        files: of its manifest.
        tensors: its tensor index, by address.
    """

    checkpoint: str
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]


@dataclass(frozen=True, kw_only=True, slots=True)
class Twin:
    """A committed segment that holds the same tensors at the same places.

    Attributes:
        checkpoint: the name of the checkpoint that holds it.
        file: its name there.
        committed: what its manifest says of it.
        digests: of its tensors, in file order.
    """

    checkpoint: str
    file: str
    committed: FileEntry
    digests: tuple[str, ...]


def find_twins(layout: Layout, tensors: Sequence[TensorInfo], previous: Previous | None) -> dict[str, Twin]:
    """The twin of each planned segment that has one, by the segment's file name."""
    if previous is None:
        return {}
    inside: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for address, entry in previous.tensors.items():
        if entry.file is not None:
            inside[entry.file].append((entry.offset, entry.bytes, address))
    twins = {}
    for segment in layout.segments:
        if segment.bytes < LINKED_FROM_BYTES:
            continue
        twin = _twin(segment, tensors, previous, inside)
        if twin is not None:
            twins[segment.file] = twin
    return twins


def _twin(
    segment: Segment,
    tensors: Sequence[TensorInfo],
    previous: Previous,
    inside: Mapping[str, list[tuple[int, int, str]]],
) -> Twin | None:
    planned = [(p.offset, p.bytes, tensors[p.index].address) for p in segment.placements]
    first = previous.tensors.get(planned[0][2])
    if first is None or first.file is None or sorted(inside[first.file]) != sorted(planned):
        return None
    digests = tuple(previous.tensors[address].digest or "" for _, _, address in planned)
    committed = previous.files.get(first.file)
    # The header too: it says dtypes and shapes.
    if committed is None or committed.digest != combine_digests([digest_of(segment.header), *digests]):
        return None
    return Twin(checkpoint=previous.checkpoint, file=first.file, committed=committed, digests=digests)
