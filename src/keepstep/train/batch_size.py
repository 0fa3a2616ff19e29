"""Memory that runs out: the largest batch that fits, and letting go of what is held."""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch

from keepstep.errors import NoBatchFitsError, UsageError

__all__ = ["clear_device_cache", "find_executable_batch_size", "release_memory", "should_reduce_batch_size"]

_OUT_OF_MEMORY = (
    " out of memory.",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # what cuDNN says of inputs that are too large
)
_SMALLER = 0.9
"""By how much Accelerate reduces the batch size each time."""


def clear_device_cache(garbage_collection: bool = False) -> None:
    """Give memory that the accelerator's allocator holds unused back to it.

    Args:
        garbage_collection: collect garbage first, which takes a while.
    """
    if garbage_collection:
        gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def release_memory(*objects: Any) -> list[None]:
    """Let go of objects, collect garbage and empty the device's cache.

    Returns:
        One None for each argument, to assign to its name.
    """
    released: list[None] = [None for _ in objects]
    del objects
    clear_device_cache(garbage_collection=True)
    return released


def should_reduce_batch_size(exception: BaseException) -> bool:
    """Whether an exception says that memory, of a device or of the host, ran out."""
    if isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exception, RuntimeError) and any(text in str(exception) for text in _OUT_OF_MEMORY)


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    reduce_batch_size_fn: Callable[[], int] | None = None,
) -> Callable[..., Any]:
    """Decorate a function to be called again with smaller batches while memory runs out.

    Each call starts from the size that the last one ended with. On several ranks, memory has to run out on
    all of them alike, as it does where they do the same.

    Args:
        function: its first parameter is the batch size, which the caller leaves out.
        starting_batch_size: the first to try.
        reduce_batch_size_fn: gives the next one to try; None for nine tenths of the last.

    Raises:
        UsageError: the caller passed a batch size, or the starting one is no positive integer.
        NoBatchFitsError: not even the smallest batch fits.
    """
    if (
        isinstance(starting_batch_size, bool)
        or not isinstance(starting_batch_size, int)
        or starting_batch_size < 1
    ):
        raise UsageError(f"starting_batch_size is {starting_batch_size!r}; expected an integer of at least 1")
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            reduce_batch_size_fn=reduce_batch_size_fn,
        )
    batch_size = starting_batch_size

    @functools.wraps(function)
    def with_batches_that_fit(*args: Any, **kwargs: Any) -> Any:
        nonlocal batch_size
        _refuse_a_batch_size(function, args)
        clear_device_cache(garbage_collection=True)
        while batch_size > 0:
            try:
                return function(batch_size, *args, **kwargs)
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                last = str(error).partition("\n")[0]
            # Only here is what the failed call held free to go: until then the exception held its frames.
            clear_device_cache(garbage_collection=True)
            batch_size = (
                int(batch_size * _SMALLER) if reduce_batch_size_fn is None else reduce_batch_size_fn()
            )
        raise NoBatchFitsError(
            f"No executable batch size found, reached zero: {function.__name__}() ran out of memory with "
            f"each from {starting_batch_size} down. The last time: {last}"
        )

    return with_batches_that_fit


def _refuse_a_batch_size(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The caller's arguments come after the batch size; one too many, and it was among them."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return
    names = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    if not names:
        raise UsageError(
            f"find_executable_batch_size: {function.__name__}() takes no parameters; its first one gets the "
            "batch size"
        )
    if len(names) < len(args) + 1:
        shown = ", ".join(f"{name}={value!r:.30}" for name, value in zip(names[1:], args[1:], strict=False))
        raise UsageError(
            f"The batch size was passed to {function.__name__}(), or one argument too many: "
            f"find_executable_batch_size passes it as the first. Call it as {function.__name__}({shown})"
        )
