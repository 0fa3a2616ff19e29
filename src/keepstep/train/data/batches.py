"""Where the batches of a prepared loader come from: the seam between a position and torch's DataLoader.

`KeyedSource` serves map-style datasets. Its inner DataLoader is fed small keys (seed, indices), and its
dataset fetches and collates a whole batch under the seed of its key. So a batch is a function of its key,
wherever and in whatever company it is loaded. What has no positions is served by `streams.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.autograd import profiler
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate, get_worker_info

from keepstep.train.data.agreement import check_alike
from keepstep.train.data.generators import KeptGenerators, Replacement
from keepstep.train.data.memory import PassMemory, sampler_parts
from keepstep.train.data.order import Order, derive_seed, draw_order
from keepstep.train.data.shares import Plan, Share, check_split
from keepstep.train.passes import Cursor
from keepstep.train.rng import drop_held_gaussian, isolated, seed_globals
from keepstep.world import World

__all__ = ["BatchSource", "KeyedSource", "announce_pass", "clone_loader", "full_batch"]

_log = logging.getLogger(__name__)
_BASE_SEED, _ORDER_SEED = -1, -2
_PROFILED_AS = "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"
Key = tuple[tuple[int, ...], Any, int]
"""What a batch's seed is derived from, its indices, and the number of the pass."""


class BatchSource(Protocol):
    """Gives this rank's batches of a pass from any position on.

    Attributes:
        share: of this rank.
    """

    share: Share

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield this rank's batches of the pass that `cursor` began, from its position on.

        `cursor.length` and `cursor.remainder` are set no later than when the last batch is given out.

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

    def bookmark(self) -> str | None:
        """What the data itself says about the batch that was given out last; None if it says nothing."""
        ...

    def go_to(self, bookmark: str | None) -> None:
        """Enter the next pass by a bookmark, if it begins at that position or behind it."""
        ...


def full_batch(loader: DataLoader[Any]) -> int | None:
    """Samples in a full batch of a loader; None if nothing says so."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    size = getattr(sampler, "batch_size", loader.batch_size)
    return size if isinstance(size, int) and size > 0 else None


class KeyedSource:
    """Batches of a map-style dataset, each a function of its key.

    Args:
        loader: the user's; its dataset, samplers, collate_fn and options are used, itself it is not run.
        share: of this rank.
        world: all ranks.

    Raises:
        UsageError: batches are to be split and can't be cut into equal parts.
    """

    def __init__(self, loader: DataLoader[Any], share: Share, world: World) -> None:
        check_split(share, full_batch(loader))
        self.share = share
        self._world = world
        self._batch_size = full_batch(loader)
        self._sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._memory = PassMemory(sampler_parts(self._sampler))
        self._keys = _KeyStream()
        self._base_generator = torch.Generator()
        self._in_workers = loader.num_workers > 0
        self._here = not self._in_workers and not loader.pin_memory
        self._keyed = _KeyedDataset(loader)
        if not loader.in_order:
            _log.warning(
                "A DataLoader with in_order=False was prepared. Its batches would come in an order that "
                "depends on timing, which no run can repeat, so they are delivered in order."
            )
        self._inner = clone_loader(
            loader,
            dataset=self._keyed,
            batch_sampler=self._keys,
            collate_fn=_pass_through,
            worker_init_fn=_WorkerStart(loader.worker_init_fn),
            generator=self._base_generator,
        )

    def batches(self, cursor: Cursor, seed: int) -> Iterator[Any]:
        """Yield the batches of one pass from the cursor's position on."""
        self._keyed.begin(cursor.pass_number)
        order = draw_order(self._sampler, seed=derive_seed(seed, _ORDER_SEED), pass_number=cursor.pass_number)
        if self.share.size > 1:
            self._check_alike(cursor, seed, order)
        plan = Plan(
            order,
            self.share,
            batch_size=self._batch_size,
            drop_last=bool(getattr(self._sampler, "drop_last", False)),
            start=cursor.position,
        )
        cursor.length, cursor.remainder = plan.end, plan.remainder
        self._base_generator.manual_seed(derive_seed(seed, _BASE_SEED))
        self._keys.arm(plan, seed, self.share.size, cursor.pass_number)
        for batch in self._loaded_here() if self._here else iter(self._inner):
            if cursor.length is None:
                cursor.length, cursor.remainder = plan.end, plan.remainder
            if self._in_workers:
                drop_held_gaussian()
            yield batch
        cursor.length, cursor.remainder = plan.end, plan.remainder

    def _loaded_here(self) -> Iterator[Any]:
        """As the inner DataLoader does it, without what it costs: most of it is a label for profilers."""
        load = self._keyed.__getitems__
        for key in self._keys:
            if profiler._is_profiler_enabled:
                with profiler.record_function(_PROFILED_AS):
                    batch = load(key)
            else:
                batch = load(key)
            yield batch

    def _check_alike(self, cursor: Cursor, seed: int, order: Order) -> None:
        facts = {
            "the number of the pass": cursor.pass_number,
            "the first batch": cursor.position,
            "the seed": seed,
            "the number of batches": order.length,
            "the order of the samples": order.digest(),
        }
        check_alike(self._world, cursor.index, facts)

    def memory(self) -> list[dict[str, Any]]:
        """What the samplers remember now."""
        return self._memory.read()

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Bring the samplers to where `memory` was read."""
        self._memory.write(memory)

    def bookmark(self) -> str | None:
        """Nothing: a position says it all."""
        return None

    def go_to(self, bookmark: str | None) -> None:
        """Do nothing."""


def announce_pass(dataset: Any, number: int) -> None:
    """Tell a data set that wants to know which pass begins."""
    announce: Callable[[int], object] | None = getattr(dataset, "set_epoch", None)
    if callable(announce):
        announce(number)


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
        self._armed: tuple[Plan, int, int, int] | None = None

    def arm(self, plan: Plan, seed: int, ranks: int, pass_number: int) -> None:
        """Set what the next iteration yields."""
        self._armed = (plan, seed, ranks, pass_number)

    def __iter__(self) -> Iterator[Key]:
        if self._armed is None:
            return
        plan, seed, ranks, pass_number = self._armed
        for unit, part, indices in plan.portions():
            # What a split unit draws depends on the cut; all else on the unit alone, on any number of ranks.
            seeds = (seed, unit) if part is None or ranks == 1 else (seed, unit, part, ranks)
            yield seeds, indices, pass_number


class _KeyedDataset(Dataset[Any]):
    """Turns a key into a collated batch, under the key's randomness alone."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.dataset = loader.dataset
        self._collate: Callable[[Any], Any] = loader.collate_fn
        self._in_batches = loader.batch_sampler is not None
        # Nothing of these draws a number, so there is nothing to seed: it would be most of a batch's cost.
        self._draws_nothing = type(self.dataset) is TensorDataset and self._collate is default_collate
        self._pass: int | None = None
        self._kept: KeptGenerators | None = None
        self._fetched, self._looks_at, self._looks_again_after = 0, 1, 1

    def __getstate__(self) -> dict[str, Any]:
        # Where generators are kept is found anew in each worker: the entries point into live objects.
        return {**self.__dict__, "_kept": None}

    def begin(self, pass_number: int) -> None:
        """Announce a pass; what keeps generators may be another than in the one before."""
        announce_pass(self.dataset, pass_number)
        self._pass, self._kept = pass_number, None
        self._looks_at = self._fetched + 1

    def __getitems__(self, key: Key) -> Any:
        seeds, indices, pass_number = key
        if pass_number != self._pass:  # in a worker that outlived the pass before
            self.begin(pass_number)
        if self._draws_nothing:
            drop_held_gaussian()  # as where something is seeded
            return self._collate(self._samples(indices))
        seed = derive_seed(*seeds)
        if get_worker_info() is not None:
            # Between batches nobody looks at a worker's global generators, so they are not put back.
            seed_globals(seed)
            return self._fetch(seed, indices)
        with isolated(seed):
            return self._fetch(seed, indices)

    def _fetch(self, seed: int, indices: Any) -> Any:
        kept = self._kept
        if kept is None:
            kept = self._kept = KeptGenerators(self.dataset, self._collate)
        batch = self._load(kept, seed, indices)
        self._fetched += 1
        if self._fetched == self._looks_at:
            # After each pass's first batch, and ever more seldom: a search may cost more than a batch.
            self._looks_at += self._looks_again_after
            self._looks_again_after *= 2
            if kept.grew():
                # A generator that this batch has made was not replaced: what it drew depends on history.
                seed_globals(seed)
                batch = self._load(kept, seed, indices)
        return batch

    def _load(self, kept: KeptGenerators, seed: int, indices: Any) -> Any:
        if kept.found:
            with Replacement(kept.found, seed):
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
