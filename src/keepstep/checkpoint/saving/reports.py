"""What each rank wrote, as it tells rank 0, and what they wrote together. Pure."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepstep.checkpoint.format.manifest import Chunk, FileEntry, TensorEntry
from keepstep.checkpoint.saving.ranks import Shard, problem_of_pieces
from keepstep.errors import RanksDifferError

__all__ = ["Report", "merge"]

_RENAME = "rename the root key of the state that looks like a name of the ranks' own (rank-00001)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What one rank wrote.

    Attributes:
        files: its files.
        tensors: index entries of whole tensors, by address.
        chunks: of sharded tensors: address, dtype, shape of the whole, and the chunk.
        tree: the rank's own state (see `keepstep.tree`), None if it has none.
        resting: what is as in the checkpoint before, see `Planner.resting`.
    """

    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    chunks: Sequence[tuple[str, str, tuple[int, ...], Chunk]]
    tree: Any = None
    resting: Mapping[str, str] = field(default_factory=dict)

    def dump(self) -> bytes:
        """The report as JSON."""
        files = {
            name: [entry.bytes, entry.digest, entry.header_bytes, entry.within]
            for name, entry in self.files.items()
        }
        tensors = {
            address: {key: value for key, value in entry._asdict().items() if value is not None}
            for address, entry in self.tensors.items()
        }
        chunks = [
            (address, dtype, whole, c.at, c.shape, c.file, c.offset, c.bytes, c.digest)
            for address, dtype, whole, c in self.chunks
        ]
        said = {"files": files, "tensors": tensors, "chunks": chunks, "tree": self.tree}
        return json.dumps({**said, "resting": self.resting}).encode()

    @classmethod
    def of(
        cls,
        entries: Mapping[str, TensorEntry],
        files: Mapping[str, FileEntry],
        shards: Iterable[Shard],
        tree: Any = None,
        resting: Mapping[str, str] | None = None,
    ) -> Report:
        """Tell chunks of larger tensors from whole ones.

        Args:
            entries: of all that was written, pieces of shards under `Shard.info`'s address.
            files: that were written.
            shards: the pieces of shards that the rank holds.
            tree: the rank's own state.
            resting: what is as in the checkpoint before.
        """
        tensors, chunks = dict(entries), []
        for shard in shards:
            entry = tensors.pop(shard.info.address, None)
            if entry is not None:
                chunk = Chunk(
                    at=shard.at,
                    shape=shard.shape,
                    file=entry.file or "",
                    offset=entry.offset,
                    bytes=entry.bytes,
                    digest=entry.digest or "",
                )
                chunks.append((shard.address, shard.dtype, shard.whole, chunk))
        return cls(files=files, tensors=tensors, chunks=chunks, tree=tree, resting=resting or {})

    @classmethod
    def load(cls, data: bytes) -> Report:
        """The report that `dump` wrote."""
        node = json.loads(data)
        return cls(
            files={
                name: FileEntry(bytes=size, digest=digest, header_bytes=header, within=within)
                for name, (size, digest, header, within) in node["files"].items()
            },
            tensors={address: TensorEntry(**_tuples(entry)) for address, entry in node["tensors"].items()},
            chunks=[
                (
                    *(address, dtype, tuple(whole)),
                    Chunk(
                        at=tuple(at), shape=tuple(shape), file=file, offset=offset, bytes=size, digest=digest
                    ),
                )
                for address, dtype, whole, at, shape, file, offset, size, digest in node["chunks"]
            ],
            tree=node["tree"],
            resting=node["resting"],
        )


def _tuples(node: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in node.items()}


def merge(
    reports: Sequence[Report], order: Sequence[str] = ()
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """The files and the tensor index of a whole checkpoint.

    Args:
        reports: of all ranks.
        order: addresses in the order in which they are to be listed; others follow.

    Raises:
        RanksDifferError: chunks don't make up a tensor.
    """
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    chunks: dict[tuple[str, str, tuple[int, ...]], list[Chunk]] = defaultdict(list)
    for report in reports:
        if twice := sorted(files.keys() & report.files):
            raise RanksDifferError(f"two ranks wrote {twice[0]}: what is in it can't be told; {_RENAME}")
        files.update(report.files)
        tensors.update(report.tensors)
        for address, dtype, whole, chunk in report.chunks:
            chunks[address, dtype, whole].append(chunk)
    for (address, dtype, whole), of_tensor in chunks.items():
        first = of_tensor[0]
        if (problem := problem_of_pieces(whole, of_tensor)) is not None:
            raise RanksDifferError(f"what was written of {address!r} is not the whole tensor: {problem}")
        tensors[address] = (
            TensorEntry(
                dtype=dtype,
                shape=whole,
                offset=first.offset,
                file=first.file,
                bytes=first.bytes,
                digest=first.digest,
            )
            if first.shape == whole
            else TensorEntry(
                dtype=dtype,
                shape=whole,
                offset=0,
                bytes=sum(chunk.bytes for chunk in of_tensor),
                chunks=tuple(sorted(of_tensor, key=lambda chunk: chunk.at)),
            )
        )
    listed = {address: tensors[address] for address in order if address in tensors}
    return dict(sorted(files.items())), {**listed, **tensors}
