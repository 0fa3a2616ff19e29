"""The plan of the next save, and what it may take over from the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from keepstep.checkpoint.format.manifest import FileEntry, TensorEntry
from keepstep.checkpoint.saving.grouping import Grouping
from keepstep.checkpoint.saving.layout import Layout, TensorInfo, find_aliases, plan
from keepstep.checkpoint.saving.linking import Previous, Twin, find_twins
from keepstep.checkpoint.saving.tracking import KnownDigests

__all__ = ["Planner", "resting_by_index"]


def resting_by_index(layout: Layout, resting: Mapping[str, str]) -> dict[int, bool]:
    """What `Planner.resting` tells of the files of a layout, by the number of the tensor."""
    return {
        placed.index: flag == "1"
        for segment in layout.segments
        for placed, flag in zip(segment.placements, resting.get(segment.file, ""), strict=False)
    }


class Planner:
    """Plans the saves of one store, one after another.

    A plan is kept while the tensors stay what they are, which they do from step to step. Where they lie
    matters only to those that share memory: random states, say, lie elsewhere each time.

    Attributes:
        known: digests of memory that has not been written to.
    """

    known: KnownDigests
    _previous: Previous | None
    _tensors: Sequence[TensorInfo]
    _layout: Layout | None

    def __init__(self) -> None:
        self.forget()

    def plan(self, tensors: Sequence[TensorInfo]) -> Layout:
        """The layout of these tensors."""
        if self._layout is None or not self._serves(self._layout, tensors):
            self._layout = plan(tensors, self._grouping.labels(tensors))
        self._tensors = tensors
        return self._layout

    def _serves(self, layout: Layout, tensors: Sequence[TensorInfo]) -> bool:
        if tensors == self._tensors:
            return True
        alike = list(map(_laid_out, tensors)) == list(map(_laid_out, self._tensors))
        return alike and tuple(find_aliases(tensors)) == layout.aliases

    def twins(self) -> dict[str, Twin]:
        """Committed segments that those of the last plan may be linked to, by file name."""
        self.known.next_save()
        if self._layout is None:
            return {}
        return find_twins(self._layout, self._tensors, self._previous)

    def follow(self, tensors: Sequence[TensorInfo], layout: Layout) -> None:
        """Take over a plan that was made elsewhere."""
        self._tensors, self._layout = tensors, layout

    @property
    def remembers(self) -> bool:
        """Whether there is a checkpoint whose segments may be linked to."""
        return self._previous is not None

    def remember(
        self, checkpoint: str, files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
    ) -> None:
        """The next save may link to this checkpoint.

        Args:
            checkpoint: its name in the store.
            files: of its manifest, those at least that hold the tensors.
            tensors: in it, by the addresses that they have in plans.
        """
        self._previous = Previous(checkpoint=checkpoint, files=files, tensors=tensors)

    def committed(
        self, checkpoint: str, files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
    ) -> None:
        """Learn from the last plan, which is the checkpoint of this name now."""
        resting = self.resting(tensors)
        self.remember(checkpoint, files, tensors)
        if not resting or self._layout is None:
            return
        if self._grouping.observe(self._layout, self._tensors, resting_by_index(self._layout, resting)):
            self._layout = None

    def resting(self, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
        """Which tensors of the last plan are as in the checkpoint before.

        Args:
            tensors: as they were written, by the addresses that they have in plans.

        Returns:
            For each file a "1" or "0" a tensor, in its order there; nothing if there was none before.
        """
        before = self._previous
        if before is None or self._layout is None:
            return {}
        found = {}
        for segment in self._layout.segments:
            addresses = [self._tensors[placed.index].address for placed in segment.placements]
            earlier = [before.tensors.get(address) for address in addresses]
            found[segment.file] = "".join(
                "1" if entry is not None and entry.digest == tensors[address].digest else "0"
                for entry, address in zip(earlier, addresses, strict=True)
            )
        return found

    def adopt(
        self, checkpoint: str, files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
    ) -> None:
        """Go on from a checkpoint that was loaded and verified."""
        self.forget()
        self.remember(checkpoint, files, tensors)
        self._grouping.adopt(tensors)

    def forget(self) -> None:
        """Link nothing to what was committed so far: it may be damaged."""
        self.known = KnownDigests()
        self._grouping = Grouping()
        self._previous = None
        self._tensors = ()
        self._layout = None


_laid_out = attrgetter("address", "group", "name", "dtype", "shape", "bytes", "frozen")
"""What the plan of a tensor that shares no memory depends on."""
