"""What data sets and workers count by themselves doesn't decide what a resumed run gets."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import Told, assert_exact
from torch.utils.data import ChainDataset, DataLoader, IterableDataset

from keepstep import Accelerator


def batches(make: Any) -> Any:
    """Three epochs of whatever a loader gives."""

    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        loader = accelerator.prepare(make())
        tape.resume()
        for epoch in accelerator.epochs(3):
            for batch in loader:
                tape.note(epoch, batch.tolist())
        return {}

    return script


class Drawing(IterableDataset[Any]):
    """Four numbers from the global generators, and the pass that it was told."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        return iter([torch.rand(1) + random.random() + self.epoch for _ in range(4)])


class OwnIteration(DataLoader[Any]):
    def __iter__(self) -> Any:
        yield from super().__iter__()


class Counting(IterableDataset[Any]):
    """Shuffles by the number of its own passes."""

    def __init__(self) -> None:
        self.times = 0

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        return iter(torch.randperm(12, generator=torch.Generator().manual_seed(self.times)).tolist())


class Asked(Counting):
    """Can say where it is between passes, where nobody asks it."""

    def state_dict(self) -> dict[str, int]:
        return {"times": self.times}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError


class Within(IterableDataset[Any]):
    """Gives what another one does."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[int]:
        return iter(self.inner)


@pytest.mark.parametrize(
    ("kind", "dataset"), [(DataLoader, Told), (DataLoader, Drawing), (OwnIteration, Drawing)]
)
def test_workers_that_persist_remember_no_pass(kind: Any, dataset: Any, tmp_path: Path) -> None:
    def loader() -> Any:
        options = {"num_workers": 1, "persistent_workers": True}
        return kind(dataset(4) if dataset is Told else dataset(), 2, **options)

    entries = assert_exact(batches(loader), tmp_path, stops=iter([3]))
    if dataset is Told:
        assert [batch for _, batch in entries] == [[epoch] * 2 for epoch in (0, 0, 1, 1, 2, 2)]
    else:
        assert len({entry[1][0][0] % 1 for entry in entries}) == 6, "other numbers in each pass"


@pytest.mark.parametrize(
    "make",
    [
        Counting,
        lambda: Within(Within(Counting())),
        lambda: Within(Asked()),
        lambda: ChainDataset([Counting(), Counting()]),
    ],
)
def test_a_stream_that_counts_its_passes(make: Any, tmp_path: Path) -> None:
    entries = assert_exact(batches(lambda: DataLoader(make(), 4)), tmp_path, stops=range(2, 9, 2))
    first, second = ([batch for epoch, batch in entries if epoch == number] for number in (0, 1))
    assert first != second
