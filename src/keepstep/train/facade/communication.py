"""Ranks: which one this is, and what they do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from keepstep.train.facade.base import Facade
from keepstep.train.process import DistributedType
from keepstep.world import Reduction

__all__ = ["Communication"]

T = TypeVar("T")


class Communication(Facade):
    """What ranks do together."""

    def wait_for_everyone(self) -> None:
        """Return once every rank has called this."""
        self._world.barrier()

    def gather(self, tensor: T) -> T:
        """Concatenate tensors of all ranks."""
        return self._world.gather(tensor)

    def gather_for_metrics(self, input_data: T, use_gather_object: bool = False) -> T:
        """Gather what an evaluation computed, without samples that fill up the last batch."""
        return self._world.gather(input_data)

    def reduce(self, tensor: T, reduction: Reduction = "sum") -> T:
        """Combine tensors of all ranks."""
        return self._world.reduce(tensor, reduction)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process run a block before the others do."""
        if not self.is_main_process:
            self._world.barrier()
        yield
        if self.is_main_process:
            self._world.barrier()

    local_main_process_first = main_process_first

    def on_main_process(self, function: Callable[..., T]) -> Callable[..., T | None]:
        """Decorate a function to run on the main process only."""

        def only_there(*args: Any, **kwargs: Any) -> T | None:
            return function(*args, **kwargs) if self.is_main_process else None

        return only_there

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once on each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)  # noqa: T201 (what the method is for)

    @property
    def num_processes(self) -> int:
        """How many ranks train together."""
        return self._world.size

    @property
    def process_index(self) -> int:
        """This rank's number."""
        return self._world.rank

    @property
    def local_process_index(self) -> int:
        """This rank's number on its machine."""
        return self._world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self._world.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank on its machine."""
        return self._world.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return self._world.rank == self._world.size - 1

    @property
    def distributed_type(self) -> DistributedType:
        """How ranks work together."""
        return self.state.distributed_type

    @property
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self._world.size > 1
