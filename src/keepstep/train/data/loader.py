"""The prepared DataLoader: iterate it as before; it knows where it is and goes on from there.

The first iteration after a restore continues the pass that was interrupted, each further one is a new pass. A
pass that is left early (`break`) is over, and so is one that runs when another state is restored.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from keepstep.errors import UsageError
from keepstep.train.data.batches import BatchSource, clone_loader, full_batch
from keepstep.train.data.order import derive_seed
from keepstep.train.data.shares import ALL_OF_IT, Share
from keepstep.train.data.sources import drops_last
from keepstep.train.passes import Cursor
from keepstep.train.placement import Placement
from keepstep.train.progress import Progress

__all__ = ["PreparedLoader", "skip_first_batches"]


class PreparedLoader(DataLoader[Any]):
    """A DataLoader whose order is a function of (seed, pass, position).

    Attributes that aren't its own (`dataset`, `batch_size`, `sampler` ...) are those of the loader that was
    prepared.

    Args:
        loader: what the user made.
        source: where its batches come from.
        share: of this rank.
        at_start: called when a new pass begins; not when one is gone on with.
        placement: what happens to each batch.
        progress: of the run.
        seed: of the run's data.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        source: BatchSource,
        placement: Placement,
        progress: Progress,
        seed: int,
        share: Share = ALL_OF_IT,
        at_start: Callable[[], None] | None = None,
    ) -> None:
        # DataLoader.__init__ is left out on purpose: this object stands in front of one that exists, and is a
        # DataLoader only so that code which asks `isinstance` goes on working.
        self.prepared_from = loader
        self.cursor: Cursor = progress.new_cursor()
        self.cursor.loader = weakref.ref(self)
        self.seed = seed
        self._source = source
        self._placement = placement
        self._progress = progress
        self._share = share
        self._at_start = at_start
        self._memory = source.memory()
        self._reading: Callable[[], Iterator[Any] | None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        if name == "prepared_from":
            raise AttributeError(name)
        return getattr(self.prepared_from, name)

    def __len__(self) -> int:
        """Batches in a whole pass on this rank."""
        return self._share.batches(len(self.prepared_from), drops_last(self.prepared_from))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return self.pass_from(None)

    def pass_from(self, first: int | None) -> Iterator[Any]:
        """Iterate once.

        Args:
            first: this rank's batch to start at; None for 0, or for where an interrupted pass is continued.
        """
        iteration = self._iterate(first)
        entry = self.cursor.current
        if entry is not None and entry.waiting and not self._progress.will_skip(self.cursor):
            # An iterator that is dropped before its first batch was still the one to continue the pass with:
            # `zip` drops that of its second loader when the first one has nothing left.
            weakref.finalize(iteration, self._progress.give_up, entry).atexit = False
        return iteration

    def _iterate(self, first: int | None) -> Iterator[Any]:
        progress, cursor, place = self._progress, self.cursor, self._placement
        if progress.skips(cursor):
            return
        if cursor.current is not None and cursor.current.waiting:
            self._source.remember(self._memory)
        else:
            self._memory = self._source.memory()
            if self._at_start is not None:
                self._at_start()
        stride = self._share.stride
        entry = progress.begin(cursor, None if first is None else first * stride)
        try:
            seed = derive_seed(self.seed, cursor.index, cursor.pass_number)
            batches = self._source.batches(cursor, seed)
            self._reading = weakref.ref(batches)
            for batch in batches:
                placed = [place(batch)]  # it counts once it is there, and is not held while it is used
                progress.advance(entry, stride)
                yield placed.pop()
                progress.check(entry)
        except BaseException:  # of the loop's body, or of what gives the next batch
            progress.leave(entry)
            raise
        finally:
            progress.end(entry)

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration pass number `epoch`; a pass that is to be continued stays so.

        Passes are counted without this; it is here for scripts that were written for other samplers.
        """
        cursor = self.cursor
        waiting = cursor.current is not None and cursor.current.waiting
        if not (waiting and cursor.pass_number == epoch):
            self._progress.next_pass(cursor, epoch)

    @property
    def position(self) -> int:
        """Batches of the pass under way that this rank was given, those before a resume included.

        After a resume in the middle of a pass `enumerate(loader)` counts from 0; this goes on. If the number
        of ranks has changed since, it says how many it would be had the whole pass run on the present one.
        """
        return -(-self.cursor.position // self._share.stride) if self.cursor.current is not None else 0

    @property
    def end_of_dataloader(self) -> bool:
        """Whether this rank was given the last batch of the pass under way."""
        return self.cursor.current is not None and self.cursor.at_end

    @property
    def remainder(self) -> int:
        """Samples of the last step of the pass under way, over all ranks, that aren't there twice.

        0 if that step is a full one, -1 if it isn't known yet.
        """
        return self.cursor.remainder if self.cursor.current is not None else -1

    @property
    def even_batches(self) -> bool:
        """Whether all ranks get the same number of batches; what is set holds from the next pass on."""
        return self._share.even

    @even_batches.setter
    def even_batches(self, value: bool) -> None:
        self._share = self._source.share = replace(self._share, even=value)

    @property
    def total_batch_size(self) -> int | None:
        """Samples in a batch over all ranks; None when a batch sampler decides."""
        size = full_batch(self.prepared_from)
        return None if size is None else size * self._share.stride

    @property
    def total_dataset_length(self) -> int:
        """Samples in the data set, over all ranks.

        Raises:
            TypeError: the data set has no length.
        """
        return len(self.prepared_from.dataset)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """Return what has to be the same in a run that resumes, and what the samplers remember."""
        goes_on = self._progress.goes_on(self.cursor)
        return {
            "shape": _shape(self.prepared_from),
            "memory": self._memory if goes_on else self._source.memory(),
            "bookmark": self._source.bookmark(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what the samplers remembered; the cursor is restored with the run's progress."""
        if isinstance(reading := self._reading(), Generator):
            reading.close()  # later, a pass that is void would disturb the source
        self._memory = state["memory"]
        self._source.remember(self._memory)
        self._source.go_to(state.get("bookmark"))

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """Say what of a saved state doesn't fit this loader: one sentence for each value that changed."""
        now = _shape(self.prepared_from)
        return [
            f"{name} was {saved['shape'].get(name)} and is {value} now"
            for name, value in now.items()
            if saved["shape"].get(name) != value
        ]


def _shape(loader: DataLoader[Any]) -> dict[str, Any]:
    """What the meaning of a position in a pass depends on."""
    return {
        "batch_size": getattr(loader.batch_sampler, "batch_size", loader.batch_size),
        "drop_last": getattr(loader.batch_sampler, "drop_last", loader.drop_last),
        "dataset length": _length_or_none(loader.dataset),
        "number of batches": _length_or_none(loader),
    }


def _length_or_none(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def skip_first_batches(loader: Any, num_batches: int = 0) -> Any:
    """Return a view of a loader whose first iteration starts at batch `num_batches` of the pass.

    The number is absolute: for a prepared loader that would go on at batch 100 after a resume, 100 starts at
    100. Batches before it are not loaded. Further iterations are whole passes.

    Args:
        loader: a prepared loader, or any DataLoader.
        num_batches: at least 0.

    Raises:
        UsageError: `num_batches` is negative.
    """
    if num_batches < 0:
        raise UsageError(f"skip_first_batches got num_batches={num_batches}; it must be at least 0.")
    return _SkippedLoader(loader, num_batches)


class _SkippedLoader:
    def __init__(self, loader: Any, skip: int) -> None:
        self._loader = loader
        self._skip = skip

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return max(len(self._loader) - self._skip, 0)

    def __iter__(self) -> Iterator[Any]:
        return self._first_use(self._from(self._skip))

    def _first_use(self, batches: Iterator[Any]) -> Iterator[Any]:
        # Used up once a batch is asked for, as `tqdm.auto` makes an iterator before the one that it uses.
        self._skip = 0
        yield from batches

    def _from(self, skip: int) -> Iterator[Any]:
        loader = self._loader
        if isinstance(loader, PreparedLoader):
            return loader.pass_from(skip)
        if not skip:
            return iter(loader)
        if isinstance(loader, DataLoader) and _can_seek(loader):
            return iter(_starting_at(loader, skip))
        return islice(iter(loader), skip, None)


def _can_seek(loader: DataLoader[Any]) -> bool:
    return type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset)


def _starting_at(loader: DataLoader[Any], skip: int) -> DataLoader[Any]:
    # Workers that persist belong to the loader itself; a copy that runs once has no use for its own.
    changes: dict[str, Any] = {"persistent_workers": False}
    if loader.batch_sampler is not None:
        return clone_loader(loader, batch_sampler=_Skipping(loader.batch_sampler, skip), **changes)
    return clone_loader(loader, batch_size=None, sampler=_Skipping(loader.sampler, skip), **changes)


class _Skipping:
    def __init__(self, sampler: Any, skip: int) -> None:
        self._sampler = sampler
        self._skip = skip

    def __len__(self) -> int:
        return max(len(self._sampler) - self._skip, 0)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._sampler), self._skip, None)
