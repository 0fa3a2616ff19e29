"""Which process does what, and when: what `PartialState` and `Accelerator` both offer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
from torch.utils.data import Subset

from keepstep.errors import UsageError
from keepstep.world import World
from keepstep.world.nested import like

__all__ = ["ProcessControl"]

R = TypeVar("R")


class ProcessControl:
    """This process among those that run together."""

    _world: World

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
    def use_distributed(self) -> bool:
        """Whether there is more than one process."""
        return self._world.size > 1

    # ---------------------------------------------------------------------------------------- waiting

    def wait_for_everyone(self) -> None:
        """Return once every rank has called this.

        Raises:
            CollectiveMismatchError: another rank called something else meanwhile.
            RankMissingError: a rank did not come within the time-out, or its process ended.
        """
        self._world.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process run a block before the others do. If it fails there, they fail too."""
        with self._goes_first("main_process_first", self.is_main_process):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """Let the first process of each machine run a block before the others do."""
        with self._goes_first("local_main_process_first", self.is_local_main_process):
            yield

    @contextmanager
    def _goes_first(self, purpose: str, goes_first: bool) -> Iterator[None]:
        if not goes_first:
            self._world.barrier(purpose)
            yield
            return
        try:
            yield
        except BaseException as error:
            self._world.barrier(purpose, failure=error)
            raise
        self._world.barrier(purpose)

    # -------------------------------------------------------------------------------------- who does it

    def on_main_process(self, function: Callable[..., R]) -> Callable[..., R | None]:
        """Decorate a function to run on the main process only; elsewhere it returns None."""
        return self._only(function, lambda: self.is_main_process)

    def on_local_main_process(self, function: Callable[..., R]) -> Callable[..., R | None]:
        """Decorate a function to run on the first process of each machine only."""
        return self._only(function, lambda: self.is_local_main_process)

    def on_last_process(self, function: Callable[..., R]) -> Callable[..., R | None]:
        """Decorate a function to run on the last process only."""
        return self._only(function, lambda: self.is_last_process)

    @overload
    def on_process(self, function: Callable[..., R], process_index: int) -> Callable[..., R | None]: ...

    @overload
    def on_process(
        self, function: None = None, process_index: int | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...

    def on_process(self, function: Any = None, process_index: int | None = None) -> Any:
        """Decorate a function to run on one process only: `@on_process(process_index=1)`.

        Args:
            function: what is decorated.
            process_index: where it runs; with one process in all, it runs there whatever is given.
        """
        return self._only_where("process_index", process_index, function)

    def on_local_process(self, function: Any = None, local_process_index: int | None = None) -> Any:
        """Decorate a function to run on one process of each machine only.

        Args:
            function: what is decorated.
            local_process_index: where it runs; with one process in all, it runs there whatever is given.
        """
        return self._only_where("local_process_index", local_process_index, function)

    def _only_where(self, name: str, number: int | None, function: Any) -> Any:
        """Decorate a function, or make what decorates one, to run where the attribute `name` is `number`."""
        if number is None:
            raise UsageError(f"{name} is not given, so the function would run nowhere: name one, as {name}=0")
        if function is None:
            return functools.partial(self._only_where, name, number)
        return self._only(function, lambda: getattr(self, name) == number or not self.use_distributed)

    @staticmethod
    def _only(function: Callable[..., R], here: Callable[[], bool]) -> Callable[..., R | None]:
        @functools.wraps(function)
        def only_there(*args: Any, **kwargs: Any) -> R | None:
            return function(*args, **kwargs) if here() else None

        return only_there

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once on each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)  # noqa: T201 (what the method is for)

    # ------------------------------------------------------------------------------------- shared work

    @contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """Give each rank its part of some inputs, for a `with` block.

        Parts follow each other in the order of ranks; where the inputs don't divide evenly, the first ranks
        have one more. With one process it has them all.

        Args:
            inputs: a list, tuple, tensor, array or dataset, or a dict of such of one length.
            apply_padding: repeat the last input, so that all parts are of one length.

        Raises:
            UsageError: inputs of another type, or a dict whose values differ in length.
        """
        world = self._world
        yield inputs if world.size == 1 else _part(inputs, world.rank, world.size, apply_padding)


def _part(inputs: Any, rank: int, size: int, padded: bool) -> Any:
    if isinstance(inputs, Mapping):
        lengths = {key: len(value) for key, value in inputs.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(
                f"split_between_processes: the values of a dict must have one length; here: {lengths}"
            )
        return like(inputs, [_part(value, rank, size, padded) for value in inputs.values()])
    if not hasattr(inputs, "__getitem__") or isinstance(inputs, str | bytes):
        raise UsageError(
            f"split_between_processes: can't split {inputs!r:.60} of type {type(inputs).__name__}; expected "
            "a list, tuple, tensor, array, dataset, or a dict of them"
        )
    each, extra = divmod(len(inputs), size)
    begin = rank * each + min(rank, extra)
    numbers = list(range(begin, begin + each + (rank < extra)))
    if padded and len(inputs):
        numbers += [len(inputs) - 1] * (each + (extra > 0) - len(numbers))
    return _picked(inputs, numbers)


def _picked(inputs: Any, numbers: list[int]) -> Any:
    if isinstance(inputs, list):
        return [inputs[number] for number in numbers]
    if isinstance(inputs, tuple):
        return tuple(inputs[number] for number in numbers)
    if isinstance(inputs, torch.Tensor) or hasattr(inputs, "__array__"):
        return inputs[numbers]
    if hasattr(inputs, "select") and hasattr(inputs, "column_names"):  # a dataset of Hugging Face's
        return inputs.select(numbers)
    return Subset(inputs, numbers)
