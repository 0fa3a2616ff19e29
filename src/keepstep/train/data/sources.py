"""Which source fits a DataLoader, on this number of ranks."""

from __future__ import annotations

import logging
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from keepstep.errors import UsageError
from keepstep.train.data.batches import BatchSource, KeyedSource, full_batch
from keepstep.train.data.dealt import DispatchedSource, SharedSource
from keepstep.train.data.memory import sampler_parts
from keepstep.train.data.shares import ALL_OF_IT, Share, check_split
from keepstep.train.data.streams import ReplayedSource, StatefulSource
from keepstep.tree import is_stateful
from keepstep.world import OneRank, World

__all__ = ["drops_last", "make_source"]

_log = logging.getLogger(__name__)


def make_source(
    loader: DataLoader[Any], *, share: Share, world: World, dispatch: bool | None = None
) -> BatchSource:
    """Choose the source that fits a DataLoader.

    Args:
        loader: the user's.
        share: of this rank.
        world: all ranks.
        dispatch: rank 0 reads for all; None: where batches have no positions.

    Raises:
        UsageError: the loader can't be shared out so.
    """
    keyed = _has_positions(loader)
    if share.size == 1:
        return KeyedSource(loader, ALL_OF_IT, world) if keyed else _stream(loader)
    _refuse_shared_already(loader, share)
    if full_batch(loader) is not None or keyed:
        check_split(share, full_batch(loader))
    if keyed and not dispatch:
        return KeyedSource(loader, share, world)
    whole: BatchSource = KeyedSource(loader, ALL_OF_IT, OneRank()) if keyed else _stream(loader)
    kind = SharedSource if dispatch is False else DispatchedSource
    return kind(whole, share, world, drop_last=drops_last(loader))


def drops_last(loader: DataLoader[Any]) -> bool:
    """Whether what is left at the end of a pass, and is too little, is left out."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return bool(getattr(sampler, "drop_last", loader.drop_last))


def _has_positions(loader: DataLoader[Any]) -> bool:
    own_iteration = type(loader).__iter__ is not DataLoader.__iter__ and not _is_torchdata(loader)
    return not own_iteration and not isinstance(loader.dataset, IterableDataset)


def _is_torchdata(loader: DataLoader[Any]) -> bool:
    """StatefulDataLoader of torchdata: over a map-style data set, all that it adds is there anyway."""
    return any(kind.__module__.startswith("torchdata.") for kind in type(loader).__mro__)


def _stream(loader: DataLoader[Any]) -> BatchSource:
    if is_stateful(loader):
        return StatefulSource(loader, loader)
    if is_stateful(loader.dataset):
        if not loader.num_workers:
            return StatefulSource(loader, loader.dataset)
        _log.warning(
            "The %s in a loader with num_workers=%d has a state that lives in its workers, where it can't be "
            "asked for; after a resume it is replayed. Use num_workers=0, or torchdata's StatefulDataLoader.",
            type(loader.dataset).__qualname__,
            loader.num_workers,
        )
    return ReplayedSource(loader)


def _refuse_shared_already(loader: DataLoader[Any], share: Share) -> None:
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    for part in sampler_parts(sampler):
        if isinstance(part, DistributedSampler) and part.num_replicas > 1:
            raise UsageError(
                f"This loader has a DistributedSampler with num_replicas={part.num_replicas}, and prepare() "
                f"shares loaders out between the {share.size} ranks by itself: done twice, most samples "
                "would be lost. Leave the DistributedSampler out (shuffle=True instead), or don't prepare "
                "this loader."
            )
