"""Where the batches of a prepared loader come from: the seam between a position and torch's DataLoader.

`KeyedSource` serves map-style datasets. Its inner DataLoader is fed small keys (seed, indices), and its
dataset fetches and collates a whole batch under the seed of its key. So a batch is a function of its key,
wherever and in whatever company it is loaded. `ReplayedSource` serves what has no positions (iterable
datasets, loaders with an iteration of their own): seeking there is running from the start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from keepstep.train.generators import KeptGenerator, Replacement, find_generators
from keepstep.train.memory import SamplerMemory
from keepstep.train.order import Order, derive_seed, draw_order
from keepstep.train.progress import Cursor
from keepstep.train.rng import PausedRandomness, drop_held_gaussian, isolated, seed_globals

__all__ = ["BatchSource", "KeyedSource", "ReplayedSource", "clone_loader", "make_source"]

_log = logging.getLogger(__name__)
_END = object()
_BASE_SEED, _ORDER_SEED = -1, -2
Key = tuple[int, Any]


class BatchSource(Protocol):
    """Gives the batches of a pass from any position on."""

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield the batches of the pass that `cursor` began, from its position on.

        `cursor.length` is set no later than when the last batch is given out.

        Args:
            cursor: of the loader.
            seed: of this pass of this loader.
        """
        ...

    def memory(self) -> list[dict[str, Any]]:
        """What the samplers remember now."""
        ...

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Bring the samplers to where `memory` was read."""
        ...


def make_source(loader: DataLoader[Any]) -> BatchSource:
    """Choose the source that fits a DataLoader."""
    own_iteration = type(loader).__iter__ is not DataLoader.__iter__
    if own_iteration or isinstance(loader.dataset, IterableDataset):
        return ReplayedSource(loader)
    return KeyedSource(loader)


class KeyedSource:
    """Batches of a map-style dataset, each a function of its key.

    Args:
        loader: the user's; its dataset, samplers, collate_fn and options are used, itself it is not run.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._memory = SamplerMemory(self._sampler)
        self._keys = _KeyStream()
        self._base_generator = torch.Generator()
        self._in_workers = loader.num_workers > 0
        if not loader.in_order:
            _log.warning(
                "A DataLoader with in_order=False was prepared. Its batches would come in an order that "
                "depends on timing, which no run can repeat, so they are delivered in order."
            )
        self._inner = clone_loader(
            loader,
            dataset=_KeyedDataset(loader),
            batch_sampler=self._keys,
            collate_fn=_pass_through,
            worker_init_fn=_WorkerStart(loader.worker_init_fn),
            generator=self._base_generator,
        )

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield the batches of one pass from the cursor's position on."""
        order = draw_order(self._sampler, seed=derive_seed(seed, _ORDER_SEED), pass_number=cursor.pass_number)
        cursor.length = order.length
        self._base_generator.manual_seed(derive_seed(seed, _BASE_SEED))
        self._keys.arm(order, seed, cursor.position)
        for batch in iter(self._inner):
            if cursor.length is None:
                cursor.length = order.length
            if self._in_workers:
                drop_held_gaussian()
            yield batch
        cursor.length = order.length

    def memory(self) -> list[dict[str, Any]]:
        """What the samplers remember now."""
        return self._memory.read()

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Bring the samplers to where `memory` was read."""
        self._memory.write(memory)


class ReplayedSource:
    """Batches of a loader that cannot seek: a position is reached by running up to it.

    The loader runs under generators of its own, so its randomness is the same at every attempt as long as
    the number of workers is.

    Args:
        loader: the user's.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield the batches of one pass from the cursor's position on."""
        start = cursor.position
        randomness = PausedRandomness(seed)
        replacement = Replacement(find_generators(self._loader.dataset), seed)
        with randomness, replacement:
            iterator = self._open(seed)
            upcoming = next(iterator, _END)
        if start:
            _log.info("Replaying %d batches of an iterable dataset to reach the saved position.", start)
        drawn = 0
        while upcoming is not _END:
            batch = upcoming
            with randomness, replacement:
                upcoming = next(iterator, _END)
            drawn += 1
            if upcoming is _END:
                cursor.length = drawn
            if drawn > start:
                yield batch

    def _open(self, seed: int) -> Iterator[Any]:
        mine = self._loader.generator
        if mine is not None:
            self._loader.generator = torch.Generator().manual_seed(seed)
        try:
            return iter(self._loader)
        finally:
            self._loader.generator = mine

    def memory(self) -> list[dict[str, Any]]:
        """Nothing: iterable datasets have no sampler."""
        return []

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Do nothing."""


def clone_loader(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A DataLoader with the options of another one, some of them changed.

    Args:
        loader: the one to copy.
        changes: arguments of DataLoader; with `batch_sampler`, the batch size and sampler are left out.
    """
    arguments: dict[str, Any] = {
        "dataset": loader.dataset,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
        **changes,
    }
    if loader.num_workers > 0:
        arguments["prefetch_factor"] = loader.prefetch_factor
    return DataLoader(**arguments)


def _pass_through(batch: Any) -> Any:
    return batch


class _KeyStream:
    """The inner loader's batch sampler: yields the keys of the pass it was armed for."""

    def __init__(self) -> None:
        self._armed: tuple[Order, int, int] | None = None

    def arm(self, order: Order, seed: int, position: int) -> None:
        """Set what the next iteration yields."""
        self._armed = (order, seed, position)

    def __iter__(self) -> Iterator[Key]:
        if self._armed is None:
            return
        order, seed, position = self._armed
        for batch, indices in enumerate(order.start_at(position), start=position):
            yield derive_seed(seed, batch), indices


class _KeyedDataset(Dataset[Any]):
    """Turns a key into a collated batch, under the key's randomness alone."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset = loader.dataset
        self._collate: Callable[[Any], Any] = loader.collate_fn
        self._in_batches = loader.batch_sampler is not None
        self._kept: list[KeptGenerator] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Where generators are kept is found anew in each worker: the entries point into live objects.
        return {**self.__dict__, "_kept": None}

    def __getitems__(self, key: Key) -> Any:
        seed, indices = key
        if self._kept is None:
            self._kept = [*find_generators(self.dataset), *find_generators(self._collate)]
        if get_worker_info() is not None:
            # Between batches nobody looks at a worker's global generators, so they are not put back.
            seed_globals(seed)
            return self._fetch(seed, indices)
        with isolated(seed):
            return self._fetch(seed, indices)

    def _fetch(self, seed: int, indices: Any) -> Any:
        if self._kept:
            with Replacement(self._kept, seed):
                return self._collate(self._samples(indices))
        return self._collate(self._samples(indices))

    def _samples(self, indices: Any) -> Any:
        dataset: Any = self.dataset
        if not self._in_batches:
            return dataset[indices]
        fetch_many = getattr(dataset, "__getitems__", None)
        return fetch_many(indices) if fetch_many else [dataset[index] for index in indices]


class _WorkerStart:
    """Shows a worker the user's dataset, not the wrapper around it, and runs the user's start-up."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self._worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        info: Any = get_worker_info()
        # The info is frozen to guard against slips; its dataset would be the wrapper.
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self._worker_init_fn is not None:
            self._worker_init_fn(worker_id)
