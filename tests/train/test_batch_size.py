"""Batches get smaller until memory suffices."""

from __future__ import annotations

import gc
import weakref

import accelerate.utils as theirs
import pytest
import torch

import keepstep.utils as ours
from keepstep.errors import NoBatchFitsError, UsageError


def fails_above(limit: int, tried: list[int], error: BaseException) -> object:
    def train(batch_size: int, factor: int = 1) -> int:
        tried.append(batch_size)
        if batch_size > limit:
            raise error
        return batch_size * factor

    return train


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"),
    ],
)
def test_sizes_are_tried_as_by_accelerate(error: RuntimeError) -> None:
    tried: tuple[list[int], list[int]] = ([], [])
    results = [
        library.find_executable_batch_size(fails_above(50, sizes, error), starting_batch_size=64)(factor=3)
        for library, sizes in zip((ours, theirs), tried, strict=True)
    ]
    assert tried[0] == tried[1]
    assert results[0] == results[1] <= 150


def test_real_memory_that_runs_out_counts_and_is_let_go() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    @ours.find_executable_batch_size(starting_batch_size=8, reduce_batch_size_fn=lambda: 2)
    def train(batch_size: int) -> int:
        gc.collect()
        assert all(tensor() is None for tensor in held)  # what the failed try made is gone
        some = torch.zeros(10)
        held.append(weakref.ref(some))
        if batch_size > 2:
            torch.empty(batch_size << 50, dtype=torch.uint8)
        return batch_size

    assert train() == 2
    assert train() == 2
    assert len(held) == 3


def test_other_errors_pass_and_zero_is_told() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        ours.find_executable_batch_size(fails_above(0, [], RuntimeError("shapes differ")))()
    with pytest.raises(
        NoBatchFitsError, match=r"reached zero: train\(\) ran out of memory.*from 4 down"
    ) as caught:
        ours.find_executable_batch_size(fails_above(0, [], MemoryError("no more")), starting_batch_size=4)()
    assert isinstance(caught.value, RuntimeError)
    assert "no more" in str(caught.value)


def test_a_batch_size_that_the_caller_passes_is_refused() -> None:
    @ours.find_executable_batch_size
    def train(batch_size: int, model: str) -> None:
        raise AssertionError

    with pytest.raises(UsageError, match=r"Call it as train\(model='m'\)"):
        train(128, "m")
    with pytest.raises(UsageError, match="starting_batch_size is 0"):
        ours.find_executable_batch_size(starting_batch_size=0)
    with pytest.raises(UsageError, match="takes no parameters"):
        ours.find_executable_batch_size(lambda: None)()


def test_memory_is_released() -> None:
    big = torch.zeros(10)
    seen = weakref.ref(big)
    (big,) = ours.release_memory(big)
    assert big is None
    assert seen() is None
