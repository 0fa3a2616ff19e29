"""What the ranks of a large run make one of them do, without the ranks: plan, merge, commit, read back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keepstep.checkpoint.format.manifest import FileEntry, TensorEntry
from keepstep.checkpoint.format.parse import read_manifest, read_state
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.checkpoint.saving.committing import Content, publish
from keepstep.checkpoint.saving.description import Lineage, describe
from keepstep.checkpoint.saving.layout import TensorInfo, segment_of
from keepstep.checkpoint.saving.ranks import Plan, Shard, plan_ranks
from keepstep.checkpoint.saving.reports import Report, merge
from keepstep.files import LocalFiles

__all__ = ["SimulatedRanks"]

_ROWS = 4
_COLUMNS = 64
_ITEM_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class SimulatedRanks:
    """Ranks that each hold some rows of every tensor, and one tensor that all of them hold.

    Attributes:
        size: how many ranks.
        tensors: how many are sharded over all of them.
    """

    size: int
    tensors: int

    def plan(self) -> Plan:
        """What rank 0 decides for all."""
        return plan_ranks(self._replicated(), [self._pieces(rank) for rank in range(self.size)])

    def reports(self, plan: Plan) -> list[bytes]:
        """What each rank sends to rank 0 once its files are written."""
        return [self._report(rank, plan).dump() for rank in range(self.size)]

    def commit(self, reports: Sequence[bytes], final: Path) -> None:
        """What rank 0 does with the reports; the segments themselves are left out."""
        files, tensors = merge([Report.load(data) for data in reports])
        tree = {address: {"$tensor": address} for address in tensors}
        content = Content(tree=tree, tensors=tensors, files=files, small={}, world_size=self.size)
        workspace = LocalWorkspace(LocalFiles(), final, may_replace=False)
        workspace.open()
        said = describe(step=1, epoch=None, metrics=None, tags=(), pinned=False)
        publish(workspace, content, said, Lineage(run="0" * 16))

    def read_back(self, final: Path) -> None:
        """What every rank does first when the run goes on."""
        read_state(final, read_manifest(final))

    def _replicated(self) -> list[TensorInfo]:
        return [
            TensorInfo(
                address="model/norm.weight",
                group="model",
                name="norm.weight",
                dtype="float32",
                shape=(_COLUMNS,),
                itemsize=_ITEM_BYTES,
                bytes=_COLUMNS * _ITEM_BYTES,
            )
        ]

    def _pieces(self, rank: int) -> list[Shard]:
        return [
            Shard(
                address=f"model/layers.{number}.weight",
                group="model",
                name=f"layers.{number}.weight",
                dtype="float32",
                itemsize=_ITEM_BYTES,
                whole=(self.size * _ROWS, _COLUMNS),
                at=(rank * _ROWS, 0),
                shape=(_ROWS, _COLUMNS),
            )
            for number in range(self.tensors)
        ]

    def _report(self, rank: int, plan: Plan) -> Report:
        pieces = self._pieces(rank)
        infos = [*self._replicated(), *(piece.info for piece in pieces)]
        files, entries = {}, {}
        for share in plan.shares[rank]:
            segment = segment_of(share.file, share.members, infos)
            files[share.file] = FileEntry(
                bytes=segment.bytes, digest=_digest(share.file), header_bytes=len(segment.header)
            )
            for placed in segment.placements:
                info = infos[placed.index]
                entries[info.address] = TensorEntry(
                    dtype=info.dtype,
                    shape=info.shape,
                    offset=placed.offset,
                    file=share.file,
                    bytes=placed.bytes,
                    digest=_digest(info.address),
                )
        return Report.of(entries, files, pieces)


def _digest(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()
