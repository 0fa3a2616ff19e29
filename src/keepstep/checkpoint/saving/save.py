"""One save, from a live state to a committed directory."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import torch

from keepstep.checkpoint.collector import collector_paused
from keepstep.checkpoint.crew import Crew
from keepstep.checkpoint.format.manifest import (
    ITEMSIZES,
    Manifest,
)
from keepstep.checkpoint.format.source import source_of
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.saving.committing import Content, publish
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.checkpoint.saving.layout import Layout, TensorInfo, tensor_entries
from keepstep.checkpoint.saving.planner import Planner
from keepstep.checkpoint.saving.staging import BlockPool, SideStreams, TensorBytes
from keepstep.checkpoint.saving.under_way import UnderWay
from keepstep.checkpoint.saving.writer import WRITER_THREADS, SegmentWriter
from keepstep.errors import RanksDifferError, StateChangedError, TensorNotSavableError, UsageError
from keepstep.outcome import Latch
from keepstep.tree import DTYPES, Flat, Leaf, flatten, local_part

__all__ = [
    "Save",
    "flatten_both",
    "info_of",
    "segment_writer",
]

_T = TypeVar("_T")


class Held:
    """A live tensor that must not be written to until it is staged, and torch's count of writes to it.

    What is written through a distributed tensor is counted there, what is written to its local part here.
    """

    __slots__ = ("_count", "_counted", "index")

    def __init__(self, index: int, leaf: Leaf) -> None:
        self.index = index
        self._counted = (leaf.tensor,) if leaf.whole is None else (leaf.tensor, leaf.whole)
        self._count = self._writes()

    def _writes(self) -> int:
        return sum(tensor._version for tensor in self._counted)

    @property
    def was_written_to(self) -> bool:
        """Whether torch has counted a write since."""
        return self._writes() != self._count


def _memory(tensor: torch.Tensor) -> tuple[torch.device, int]:
    held = local_part(tensor)
    return held.device, held.untyped_storage().data_ptr()


def _memories(tensors: Iterable[torch.Tensor]) -> set[tuple[torch.device, int]]:
    """Where they lie. Some say of no memory that it is theirs, so none that a part of a state may lie in.

    Such are sparse and mkldnn ones (NotImplementedError, a RuntimeError), wrappers of other tensors
    (RuntimeError; a write goes through what they wrap, and is counted there) and those of lazy modules that
    are not made yet (ValueError).
    """
    found = set()
    for tensor in tensors:
        with contextlib.suppress(RuntimeError, ValueError):
            found.add(_memory(tensor))
    return found


class Save:
    """One checkpoint on its way.

    Flattening and planning happen at once; then one of

    * `write`: copy, write and commit; the state must not change meanwhile.
    * `stage` (the state may change afterwards), then `finish` from any thread.
    * `hold` (what changes of itself is copied, if it is not too much), then `stage` and `finish` from any
      thread; the state must not change until `stage` has returned, and `finish` refuses if it did.
    """

    def __init__(
        self,
        *,
        workspace: Workspace,
        planner: Planner,
        state: Any,
        description: Description,
        lineage: Lineage,
        pool: BlockPool,
        own: Any = None,
    ) -> None:
        self.workspace = workspace
        self._planner = planner
        self._description = description
        self._lineage = lineage
        with collector_paused():
            self._lay_out(state, own)
        with workspace.explained():
            workspace.check()
        self._held: list[Held] = []
        self._behind = False  # the caller waits until all is copied
        self._written_to: list[str] = []
        self._sealed = Latch()
        self._ordered_by = threading.current_thread()
        self._under_way: UnderWay | None = None
        self._writer = self._make_writer(pool)

    def _lay_out(self, state: Any, own: Any) -> None:
        """Take the state apart, and what is the rank's own beside it; decide what goes where."""
        flat, self._own = flatten_both(state, own, 0)
        leaves = [*flat.leaves, *self._own.leaves]
        for leaf in leaves:
            if leaf.shard is not None and tuple(leaf.tensor.shape) != leaf.shard[1]:
                raise RanksDifferError(_PART.format(address=leaf.address, shape=list(leaf.shard[1])))
        self._flat = Flat(tree=flat.tree, leaves=leaves)
        self._infos = [info_of(leaf) for leaf in leaves]
        self._layout = self._planner.plan(self._infos)

    def _make_writer(self, pool: BlockPool) -> SegmentWriter:
        writer, self._sources, self._streams = segment_writer(
            self.workspace, self._layout, self._flat.leaves, pool, self._planner
        )
        return writer

    @property
    def bytes(self) -> int:
        """Size of all segments."""
        return self._layout.bytes

    @property
    def bytes_of_all(self) -> int:
        """Size of the segments of all ranks."""
        return self.bytes

    def write(self) -> Manifest:
        """Copy, write and commit; durable on return.

        Raises:
            StoreError: any of its kinds; the unfinished directory is gone.
        """
        with collector_paused():
            return self._discarding(self._write_and_commit)

    @property
    def on_devices(self) -> bool:
        """Whether part of the state lies on an accelerator."""
        return any(leaf.tensor.device.type != "cpu" for leaf in self._flat.leaves)

    def hold(self, changing: Iterable[torch.Tensor], steady: Iterable[torch.Tensor] = ()) -> bool:
        """Copy what may change before everything is staged, and take note of the rest's versions.

        Args:
            changing: tensors that the next forward and backward write to, such as buffers.
            steady: distributed tensors that they don't write to; others are taken for changing.

        Returns:
            False if that is too much to be held in memory beside the blocks; then nothing was copied, and
            everything has to be staged at once.
        """
        memories = _memories(changing)
        memories |= {_memory(leaf.tensor) for leaf in self._flat.leaves if not leaf.counted}
        shards = {_memory(leaf.tensor) for leaf in self._flat.leaves if leaf.whole is not None}
        memories |= shards - _memories(steady) if shards else set()
        pairs = list(zip(self._flat.leaves, self._sources, strict=True))
        moving = [not leaf.counted or _memory(leaf.tensor) in memories for leaf, _ in pairs]
        if sum(source.bytes for (_, source), moves in zip(pairs, moving, strict=True) if moves) > _HELD_BYTES:
            return False
        for index, ((leaf, source), moves) in enumerate(zip(pairs, moving, strict=True)):
            if moves:
                source.take_copy()
            else:
                self._held.append(Held(index, leaf))
        self._streams.follow()
        self._writer.step_back()
        self._behind = True
        return True

    @property
    def is_spoiled(self) -> bool:
        """Whether it is known that what was held was written to, so that `finish` is going to refuse."""
        return bool(self._written_to)

    def stage(self) -> None:
        """Copy the state out; writing goes on behind. Call `finish` afterwards."""
        self._discarding(self._open_and_stage)

    def seal(self) -> None:
        """Take note of what was written to since `hold`; whatever is written after this call is no concern.

        Called after `stage` by the thread that is about to write: torch counts a write when it is done, and
        no other thread knows whether one is under way. If that thread does not come by, `finish` calls it
        once what the thread was in the middle of is over.
        """
        # No lock: the handler of a signal may wait for the save in the middle of this. Whoever has compared
        # first decides, and is no later than the first write that is no concern.
        written = [self._infos[h.index].address for h in self._held if h.was_written_to]
        if self._sealed.is_open:
            return
        self._written_to += written
        self._sealed.open()
        self._held = []

    def finish(self) -> Manifest:
        """Wait until all that was staged is written, and commit.

        Raises:
            StateChangedError: what was held was written to before it was staged; nothing was committed.
        """
        return self._discarding(self._drain_and_commit)

    def _discarding(self, work: Callable[[], _T]) -> _T:
        with self.workspace.explained():
            try:
                return work()
            except BaseException:
                self.discard()
                raise

    def discard(self) -> None:
        """Stop and remove what was written; a committed checkpoint stays."""
        self._writer.abort()
        self.workspace.discard()

    def _write_and_commit(self) -> Manifest:
        self.workspace.open()
        self._writer.write()
        return self._commit()

    def _open_and_stage(self) -> None:
        self.workspace.open()
        if not self._behind:
            self._writer.synchronize()
        self._writer.stage()
        if self._held:
            self._under_way = UnderWay(self._ordered_by)
        self._flat = Flat(tree=self._flat.tree, leaves=[])  # the live tensors are not ours any more

    def _drain_and_commit(self) -> Manifest:
        self._writer.drain()
        self._let_writes_end()
        self.seal()
        if self._written_to:
            raise StateChangedError(list(dict.fromkeys(self._written_to)))  # both threads may have found it
        return self._commit()

    def _let_writes_end(self) -> None:
        """Wait until a write that the training had begun before all was copied is over, and so is counted."""
        ends_s, pause_s = time.monotonic() + _LONGEST_WRITE_S, _SHORTEST_PAUSE_S
        while self._under_way is not None and not self._sealed.is_open and not self._under_way.is_over:
            if time.monotonic() > ends_s:
                return
            self._sealed.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _commit(self) -> Manifest:
        files = self._writer.file_entries()
        tensors = tensor_entries(self._infos, self._layout, self._writer.digests)
        manifest = publish(
            self.workspace,
            Content(
                tree=self._flat.tree,
                tensors=tensors,
                files=files,
                small=self._layout.indexes,
                ranks=None if self._own.tree is None else [self._own.tree],
            ),
            self._description,
            self._lineage,
        )
        self._planner.committed(source_of(self.workspace.final).name, manifest.files, tensors)
        return manifest


_PART = (
    "only a part of {address!r} (shape {shape}) lies on this rank, and this store saves for one process: "
    "give it the world of all ranks, Store(path, world=Ranks())"
)


def flatten_both(state: Any, own: Any, rank: int) -> tuple[Flat, Flat]:
    """The state, and what is one rank's own, apart; the tree of the latter is None if there is nothing.

    Raises:
        UsageError: the state has a root key that names like the rank's.
    """
    flat, key = flatten(state), f"rank-{rank:05d}"
    if own is None:
        return flat, Flat(tree=None, leaves=[])
    mine = flatten({key: own})
    if any(leaf.group == key for leaf in flat.leaves):
        raise UsageError(f"the state has the root key {key!r}, which names what is the rank's own; rename it")
    return flat, Flat(tree=mine.tree[key], leaves=mine.leaves)


_HELD_BYTES = 128 << 20
"""Most memory for copies of what changes while the rest is staged: a save beyond that is staged at once."""

_LONGEST_WRITE_S: Final = 30.0
"""A single operation on the state takes no longer. A thread that stands still for so long sleeps, or waits
for input, and what it ordered is committed."""

_SHORTEST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.005

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items() if name in ITEMSIZES}


def segment_writer(
    workspace: Workspace,
    layout: Layout,
    leaves: Sequence[Leaf],
    pool: BlockPool,
    planner: Planner,
) -> tuple[SegmentWriter, list[TensorBytes], SideStreams]:
    """What writes these tensors, with the sources and streams that it copies from."""
    devices = {leaf.tensor.device for leaf in leaves if leaf.tensor.device.type != "cpu"}
    if devices:
        pool.pin()
    streams = SideStreams(devices)
    sources = [TensorBytes(leaf.tensor, streams) for leaf in leaves]
    writer = SegmentWriter(
        workspace,
        layout,
        sources,
        devices=tuple(devices),
        twins=planner.twins(),
        known=planner.known,
        pool=pool,
        crew=Crew(WRITER_THREADS + 1, "keepstep-write"),  # while a state is staged, two copy and two write
    )
    return writer, sources, streams


def info_of(leaf: Leaf) -> TensorInfo:
    """What the layout has to know of a leaf.

    Raises:
        TensorNotSavableError: of a dtype that the format does not know.
    """
    tensor = leaf.tensor
    dtype = _DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise TensorNotSavableError(
            f"cannot save {leaf.address!r}: {tensor.dtype} has no place in checkpoints of this keepstep; "
            "save tensor.view(torch.uint8)"
        )
    hidden = tensor.is_conj() or tensor.is_neg()  # the bytes in memory are not the values
    memory = None if hidden else (tensor.get_device(), tensor.untyped_storage().data_ptr())
    return TensorInfo(
        leaf.address,
        leaf.group,
        leaf.name,
        dtype,
        tuple(tensor.shape),
        tensor.itemsize,
        tensor.nbytes,
        memory,
        tensor.data_ptr(),
        tensor.stride(),
        tensor.is_contiguous(),
        leaf.frozen,
    )
