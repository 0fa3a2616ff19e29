"""What the ranks' next save takes over from the last one: who writes what, and what need not be written.

Each rank remembers what it wrote itself, which is all that it may link to, and tells what of it rests. Rank 0
decides by it which tensors share a file.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from keepstep.checkpoint.format.manifest import Chunk, Manifest, TensorEntry
from keepstep.checkpoint.saving.grouping import Grouping
from keepstep.checkpoint.saving.layout import TensorInfo, find_aliases
from keepstep.checkpoint.saving.planner import Planner, resting_by_index
from keepstep.checkpoint.saving.ranks import Plan, Shard, Share, by_piece, plan_ranks

__all__ = ["RankPlanner"]


class RankPlanner:
    """Plans the saves of one store by many ranks, one after another.

    A plan is kept while no rank's tensors change and none is to move to another file.

    Args:
        size: how many ranks there are.

    Attributes:
        share: plans the share of this rank, and what of it may be linked.
        id: of the plan that `files` are from; empty before there is one.
        files: which this rank writes.
        plan: for all ranks; only rank 0 has it.
    """

    plan: Plan | None
    _key: tuple[Any, ...] | None
    _frozen: Sequence[bool]
    _grouping: Grouping
    _adopted: Mapping[str, str]

    def __init__(self, size: int) -> None:
        self._size = size
        self.share = Planner()
        self.id = ""
        self.files: Sequence[Share] = []
        self.forget()

    def take(self, plan_id: str, files: Sequence[Share]) -> None:
        """The plan is now this one, and these are the rank's files."""
        self.id, self.files = plan_id, files

    def adopt(self, checkpoint: str, manifest: Manifest, tensors: Mapping[str, TensorEntry]) -> None:
        """Go on from a checkpoint that was loaded and verified.

        If another number of ranks saved it, its files are other shares than those to be written.
        """
        self.forget()
        if manifest.environment.get("world_size") != self._size:
            return
        pieces = {
            address: part if isinstance(part, TensorEntry) else _entry_of(whole, part)
            for address, whole, part in by_piece(tensors)
        }
        self.share.remember(checkpoint, manifest.files, pieces)
        self._grouping.adopt(pieces)
        self._adopted = {address: str(entry.file) for address, entry in pieces.items()}

    def forget(self) -> None:
        """Link nothing to what was committed so far: it may be damaged."""
        self.share.forget()
        self.plan = None
        self._key = None
        self._frozen = ()
        self._grouping = Grouping()
        self._adopted = {}

    # ------------------------------------------------------------------------------------- rank 0

    def fits(self, key: tuple[Any, ...], ids: Sequence[str], held: Sequence[TensorInfo]) -> bool:
        """Whether the last plan serves again.

        Args:
            key: what all ranks hold.
            ids: of the plan that each has its files from.
            held: the tensors that every rank holds.
        """
        if self.plan is None or self._key != key or any(plan_id != self.id for plan_id in ids):
            return False
        # Names and shapes may be the same while what shares memory, or is trained, is not any more.
        return _frozen(held) == self._frozen and tuple(find_aliases(held)) == self.plan.aliases

    def decide(self, held: Sequence[TensorInfo], pieces: Sequence[Sequence[Shard]]) -> list[tuple[Any, ...]]:
        """Plan anew; what each rank is to `take`. Arguments as of `plan_ranks`."""
        self.plan = None
        plan = plan_ranks(held, pieces, labels=self._grouping.labels)
        if self._scatters(plan):
            self._grouping, self._adopted = Grouping(), {}
            plan = plan_ranks(held, pieces, labels=self._grouping.labels)
        self.plan, self._key, self._frozen = plan, None, _frozen(held)
        name = secrets.token_hex(8)
        return [(name, files) for files in plan.shares]

    def _scatters(self, plan: Plan) -> bool:
        """Whether several ranks would write what lay in one file of the checkpoint that was loaded.

        Each of its files has a label of its own, so that with every such resume there would be more files.
        """
        writers = {share.file: rank for rank, shares in enumerate(plan.shares) for share in shares}
        found: dict[str, int] = {}
        for segment in plan.layout.segments:
            for placed in segment.placements:
                file = self._adopted.get(plan.tensors[placed.index].address)
                writer = writers[segment.file]
                if file is not None and found.setdefault(file, writer) != writer:
                    return True
        return False

    def learn(self, key: tuple[Any, ...], resting: Mapping[str, str]) -> None:
        """A checkpoint was made by the last plan.

        Args:
            key: what all ranks held; by now all have their files.
            resting: what each rank found to be as before, see `Planner.resting`.
        """
        self._key = key
        if self.plan is None or not resting:
            return
        layout = self.plan.layout
        if self._grouping.observe(layout, self.plan.tensors, resting_by_index(layout, resting)):
            self._key = None


def _frozen(tensors: Sequence[TensorInfo]) -> list[bool]:
    return [tensor.frozen for tensor in tensors]


def _entry_of(whole: TensorEntry, chunk: Chunk) -> TensorEntry:
    """A chunk as the tensor that is planned for it."""
    return TensorEntry(
        dtype=whole.dtype,
        shape=chunk.shape,
        offset=chunk.offset,
        file=chunk.file,
        bytes=chunk.bytes,
        digest=chunk.digest,
    )
