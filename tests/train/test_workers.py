"""Worker processes: the same batches as without them, whatever their number and way of starting."""

# ruff: noqa: NPY002 - NumPy's global generator is one of those that have to be exact
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import (
    Noisy,
    OwnGenerator,
    assert_exact,
    assert_same,
    attempt,
    noisy_collate,
    plain_script,
)
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from keepstep import Accelerator


def two_passes(**options: Any) -> list[Any]:
    dataset = options.pop("dataset", None) or Noisy(18)
    torch.manual_seed(4)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(dataset, 4, shuffle=True, collate_fn=noisy_collate, **options)
    )
    return [batch for _ in range(2) for batch in loader]


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 2},
        {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
        {"num_workers": 2, "in_order": False},
    ],
    ids=["one", "two", "persistent", "out of order"],
)
def test_workers_change_nothing(options: dict[str, Any]) -> None:
    assert_same(two_passes(**options), two_passes())


def test_started_by_spawn() -> None:
    assert_same(two_passes(num_workers=1, multiprocessing_context="spawn"), two_passes())


def test_a_generator_kept_by_the_dataset() -> None:
    dataset = OwnGenerator(18)
    before = dataset.rng.bit_generator.state
    assert_same(two_passes(dataset=dataset), two_passes(dataset=OwnGenerator(18), num_workers=2))
    assert dataset.rng.bit_generator.state == before


def test_resumed_with_another_number_of_workers(tmp_path: Path) -> None:
    def script(workers: int, **options: Any) -> Any:
        return plain_script(lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=workers, **options))

    whole, entries = attempt(script(0), tmp_path / "whole")
    project = tmp_path / "broken"
    _, first = attempt(script(2, persistent_workers=True), project, 2)
    _, second = attempt(script(0), project, 3)
    _, third = attempt(script(1), project, 3)
    result, last = attempt(script(2), project)
    assert first + second + third + last == entries
    assert_same(result, whole)


def test_interrupted_with_workers(tmp_path: Path) -> None:
    script = plain_script(
        lambda: DataLoader(Noisy(), 4, shuffle=True, num_workers=2, persistent_workers=True)
    )
    assert_exact(script, tmp_path, stops=range(2, 9, 3))


class Opened(Noisy):
    """Has something to do in each worker."""

    handle: str | None = None

    def __getitem__(self, index: int) -> Any:
        info = get_worker_info()
        assert info is not None
        assert info.dataset is self
        return torch.tensor([float(info.id)]), self.handle


def open_handle(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.handle = f"worker {worker_id}"  # type: ignore[attr-defined]


def test_worker_start_up_sees_the_dataset() -> None:
    loader = Accelerator(cpu=True).prepare(
        DataLoader(Opened(8), 4, num_workers=2, worker_init_fn=open_handle, timeout=30)
    )
    assert [set(handles) for _, handles in loader] == [{"worker 0"}, {"worker 1"}]


class Failing(Noisy):
    """Cannot load sample 9."""

    def __getitem__(self, index: int) -> Any:
        if index == 9:
            random.random()
            raise RuntimeError("sample 9 is broken")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_pass_through_and_leave_generators_alone(workers: int) -> None:
    loader = Accelerator(cpu=True).prepare(DataLoader(Failing(12), 4, num_workers=workers))
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    with pytest.raises(RuntimeError, match="sample 9 is broken"):
        list(loader)
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert_same(after, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_never_move(workers: int) -> None:
    loader = Accelerator(cpu=True).prepare(
        DataLoader(Noisy(12), 4, shuffle=True, num_workers=workers, collate_fn=noisy_collate)
    )
    np.random.randn()
    draws = []
    for iterate in (True, False):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        if iterate:
            list(loader)
        draws.append((torch.rand(1), np.random.rand(), random.random()))
    assert_same(draws[0], draws[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_held_gaussian_is_dropped_alike(workers: int) -> None:
    """What the training loop draws from NumPy doesn't depend on where batches are loaded."""
    loader = Accelerator(cpu=True).prepare(DataLoader(Noisy(12), 4, num_workers=workers))
    np.random.seed(1)
    drawn = [np.random.randn() for _ in loader]
    reference = np.random.RandomState(1)
    expected = []
    for _ in range(3):
        reference.set_state({**reference.get_state(legacy=False), "has_gauss": 0})
        expected.append(reference.randn())
    assert drawn == expected


class Stream(IterableDataset[Any]):
    """Random samples without positions."""

    def __iter__(self) -> Any:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, 22, step):
            yield torch.full((4,), float(index)) + torch.rand(4) + random.random(), index


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets_are_replayed(workers: int, tmp_path: Path) -> None:
    script = plain_script(lambda: DataLoader(Stream(), 4, num_workers=workers))
    assert_exact(script, tmp_path, stops=range(1, 12, 2 if workers == 0 else 5))


def test_loaders_with_an_iteration_of_their_own(tmp_path: Path) -> None:
    class Doubling(DataLoader[Any]):
        def __iter__(self) -> Any:
            for inputs, indices in super().__iter__():
                yield inputs * 2, indices

    script = plain_script(lambda: Doubling(Noisy(), 4, shuffle=True))
    assert_exact(script, tmp_path, stops=range(1, 12, 3))
