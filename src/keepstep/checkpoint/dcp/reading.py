"""`StorageReader`: torch.distributed.checkpoint loads from a keepstep checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from keepstep.checkpoint.dcp.memory import follow
from keepstep.checkpoint.dcp.names import Places, leaves
from keepstep.checkpoint.dcp.spots import is_place
from keepstep.checkpoint.format.boxes import Box
from keepstep.checkpoint.format.manifest import Chunk, TensorEntry, stored_parts
from keepstep.checkpoint.loading.passes import Target, bytes_of
from keepstep.checkpoint.loading.reader import Reader
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import MismatchError, UsageError
from keepstep.tree import DTYPES, tensors_in, unflatten

__all__ = ["StorageReader"]

log = logging.getLogger(__name__)


class StorageReader(storage.StorageReader):
    """Reads a keepstep checkpoint for `dcp.load`, whoever wrote it: `dcp.save` or `Store.save`.

    Names are DCP's: the path in the state, joined by dots. Each rank reads what it needs, and verifies it: a
    chunk has one digest, so a rank that needs a part of one reads all of it (at most 64 MiB, if it comes from
    a sharded tensor).

    Args:
        path: the checkpoint's directory or address. A `checkpoint_id` given to `dcp.load` takes its place.
        storage_options: of a bucket, see `Store`.

    Raises:
        DamagedCheckpointError: from `dcp.load`, as the cause of its CheckpointException.
        UsageError: the planner unpickles values that are no tensors; the cause as well.
        MismatchError: the planner's mappings lead nowhere, or a shape differs; the cause as well.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        self._path = os.fspath(path)
        self._options = storage_options
        self._reader: Reader | None = None
        self._saved: dict[str, _Saved] = {}

    @property
    def checkpoint_id(self) -> str:
        """The directory, or the address."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint can lie there."""
        return is_place(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Get ready for another load."""
        self._reader = None
        if checkpoint_id is not None:
            self._path = os.fspath(checkpoint_id)

    def read_metadata(self) -> Metadata:
        """What the checkpoint holds, in DCP's terms."""
        self._reader = reader = Checkpoint.open(self._path, storage_options=self._options).reader()
        self._saved = {}
        alike: set[str] = set()
        for path, node in leaves(reader.tree, ()):
            name = ".".join(map(str, path))
            if self._saved.setdefault(name, _Saved(path, node)).node is not node:
                alike.add(name)
        for name in alike:  # DCP then says that it is missing, where either value may be the wrong one
            log.warning("%s holds several values that DCP calls %r; it loads none of them", self._path, name)
            del self._saved[name]
        return Metadata(
            state_dict_metadata={
                fqn: _tensor_metadata(reader.entry(saved.node["$tensor"]))
                if saved.is_tensor
                else BytesStorageMetadata()
                for fqn, saved in self._saved.items()
            },
            planner_data={fqn: saved.path for fqn, saved in self._saved.items()},
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Called by DCP on each rank."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Called by DCP on each rank."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Called by DCP on the coordinator."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Called by DCP on each rank: reads and verifies what the rank needs."""
        if self._reader is None:
            self.read_metadata()
        assert self._reader is not None
        items = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        objects = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        places = _places_of_objects(objects, planner)  # what has none is told before anything is overwritten
        for batch in _in_batches(_Wanted.of(self._reader, self._saved, planner, item) for item in items):
            self._reader.read_into([target for wanted in batch if (target := wanted.target) is not None])
            for wanted in batch:
                wanted.settle(self._reader, planner)
        self._set_objects(objects, places)
        self._remember(planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _remember(self, planner: LoadPlanner) -> None:
        """The next save beside a checkpoint that was loaded whole, and so verified, may link to it."""
        assert self._reader is not None
        if self._saved.keys() <= getattr(planner, "state_dict", {}).keys():
            follow(self._reader.place, self._reader.manifest, self._reader.tensors)

    def _set_objects(self, items: Sequence[ReadItem], places: Mapping[str, tuple[Any, Any]]) -> None:
        assert self._reader is not None
        nodes = {item.dest_index.fqn: self._saved[item.storage_index.fqn].node for item in items}
        tensors = self._reader.fresh(address for node in nodes.values() for address in tensors_in(node))
        for fqn, node in nodes.items():
            container, key = places[fqn]
            container[key] = unflatten(node, tensors.__getitem__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Saved:
    """A leaf of the saved state, as DCP counts leaves."""

    path: tuple[Any, ...]
    node: Any

    @property
    def is_tensor(self) -> bool:
        return type(self.node) is dict and "$tensor" in self.node


def _tensor_metadata(entry: TensorEntry) -> TensorStorageMetadata:
    boxes = [
        (part.at, part.shape) if isinstance(part, Chunk) else ((0,) * len(entry.shape), entry.shape)
        for part in stored_parts(entry) or (entry,)
    ]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[ChunkStorageMetadata(offsets=torch.Size(at), sizes=torch.Size(shape)) for at, shape in boxes],
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Wanted:
    """Some elements of a saved tensor, and the live tensor that takes them."""

    item: ReadItem
    live: torch.Tensor
    address: str
    box: Box
    memory: torch.Tensor | None
    """Host memory to read into: the live tensor's own, or other; None for an alias, read by itself."""

    @classmethod
    def of(cls, reader: Reader, saved: Mapping[str, _Saved], planner: LoadPlanner, item: ReadItem) -> _Wanted:
        live = planner.resolve_tensor(item).detach()
        address = saved[item.storage_index.fqn].node["$tensor"]
        entry = reader.entry(address)
        begin = item.storage_index.offset or (0,) * len(entry.shape)
        at = tuple(map(sum, zip(begin, item.storage_offsets, strict=True)))
        box = Box(at, tuple(item.lengths))
        if tuple(live.shape) != box.shape:
            raise MismatchError(
                f"{item.dest_index.fqn}: {list(box.shape)} elements of the checkpoint at {list(at)} were to "
                f"go into a tensor of shape {list(live.shape)}"
            )
        dtype = DTYPES[entry.dtype]
        dense = live.device.type == "cpu" and live.is_contiguous() and not (live.is_conj() or live.is_neg())
        memory = None
        if entry.alias_of is None:
            memory = live if dense and live.dtype == dtype else torch.empty(box.shape, dtype=dtype)
        return cls(item, live, address, box, memory)

    @property
    def target(self) -> Target | None:
        return None if self.memory is None else Target(self.address, bytes_of(self.memory), self.box)

    def settle(self, reader: Reader, planner: LoadPlanner) -> None:
        if self.memory is None:
            view = reader.fresh([self.address])[self.address]
            for dimension, (begin, size) in enumerate(zip(self.box.at, self.box.shape, strict=True)):
                view = view.narrow(dimension, begin, size)
            self.live.copy_(view)
        elif self.memory is not self.live:
            self.live.copy_(self.memory)
        planner.commit_tensor(self.item, self.live)


_BATCH_BYTES = 256 << 20


def _in_batches(wanted: Iterable[_Wanted]) -> Iterator[list[_Wanted]]:
    """As many at a time as other memory than the live tensors' takes 256 MiB."""
    batch: list[_Wanted] = []
    extra = 0
    for one in wanted:
        batch.append(one)
        extra += 0 if one.memory is None or one.memory is one.live else one.memory.nbytes
        if extra >= _BATCH_BYTES:
            yield batch
            batch, extra = [], 0
    if batch:
        yield batch


def _places_of_objects(items: Sequence[ReadItem], planner: LoadPlanner) -> dict[str, tuple[Any, Any]]:
    """The container and the key that take each value that is no tensor: `load_bytes` would unpickle it."""
    fqns = [item.dest_index.fqn for item in items]
    if not fqns:
        return {}
    default = DefaultLoadPlanner
    if not (isinstance(planner, default) and type(planner).load_bytes is default.load_bytes):
        raise UsageError(
            f"{fqns[0]!r} is no tensor, and {type(planner).__name__} takes such values as bytes of its own "
            "making only. keepstep keeps them as typed JSON, never as pickled bytes: use DefaultLoadPlanner "
            "(a subclass may override all but load_bytes), or leave them out of the state dict to load"
        )
    if not planner.flatten_state_dict:
        return {fqn: (planner.state_dict, fqn) for fqn in fqns}
    live = Places(planner.original_state_dict)
    places = {fqn: live.find(planner.mappings[fqn]) for fqn in fqns}
    found = {fqn: place for fqn, place in places.items() if place is not None}
    if missing := sorted(places.keys() - found.keys()):
        raise MismatchError(
            f"{type(planner).__name__} asks for {missing[0]!r}, and its mappings lead to no place in its "
            f"original_state_dict: {planner.mappings[missing[0]]}. This rank's state is unchanged. Let them "
            "lead into the state dict to load, or leave the value out"
        )
    return found
