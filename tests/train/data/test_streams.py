"""Streams: those that say where they are go on from there, the others are replayed."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import Noisy, Told, assert_exact, attempt, plain_script
from torch.utils.data import DataLoader, IterableDataset

from keepstep import Accelerator
from keepstep.errors import UnsupportedTypeError


class Shards(IterableDataset[Any]):
    """A new permutation in each pass; says which, and how far it is. Draws from every generator."""

    def __init__(self, length: int = 22) -> None:
        self.length = length
        self.times = 0
        self.done = 0
        self.reads = 0
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.times)).tolist()
        own = self.rng
        while self.done < self.length:
            index = order[self.done]
            self.done += 1
            self.reads += 1
            noise = torch.rand(4) + random.random() + float(own.standard_normal()) + np.random.rand()  # noqa: NPY002
            yield noise + index, index
        self.times += 1
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"times": self.times, "done": torch.tensor([self.done])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times, self.done = state["times"], int(state["done"])


@pytest.mark.parametrize("batch_size", [4, 11])
def test_a_stream_with_a_state_goes_on_where_it_was(batch_size: int, tmp_path: Path) -> None:
    entries = assert_exact(
        plain_script(lambda: DataLoader(Shards(), batch_size)),
        tmp_path,
        stops=range(1, 12, 1 + (batch_size < 5)),
    )
    epochs = [[i for epoch, indices, *_ in entries if epoch == number for i in indices] for number in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(22))
    assert epochs[0] != epochs[1]


def test_nothing_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = plain_script(lambda: DataLoader(Shards(), 4), epochs=1)
    attempt(script, tmp_path, 4)
    dataset = Shards()
    attempt(plain_script(lambda: DataLoader(dataset, 4), epochs=1), tmp_path)
    assert dataset.reads == 22 - 16
    assert "Replaying" not in caplog.text


def test_a_stream_that_is_left_and_entered_again(tmp_path: Path) -> None:
    """The stream itself decides where the next pass begins: where its last batch ended."""

    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        loader = accelerator.prepare(DataLoader(Shards(), 4))
        tape.resume()
        for epoch in accelerator.epochs(2):
            for noise, indices in loader:
                tape.note(epoch, indices.tolist(), noise.tolist())
                if loader.position == 3:
                    break
        return {}

    # Not 3: what follows the save in the body, here the break, isn't run again.
    entries = assert_exact(script, tmp_path, stops=iter([1, 2, 4, 5]))
    assert sorted(index for _, indices, _ in entries for index in indices) == list(range(22))


def test_in_workers_a_state_is_out_of_reach(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class InWorkers(Shards):
        def __init__(self) -> None:
            super().__init__(12)

    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        loader = accelerator.prepare(DataLoader(InWorkers(), 4, num_workers=1))
        tape.resume()
        for _ in accelerator.epochs(1):
            for noise, indices in loader:
                tape.note(indices.tolist(), noise.tolist())
        return {}

    assert_exact(script, tmp_path, stops=range(2, 3))
    assert "Use num_workers=0" in caplog.text
    assert "Replaying 2 batches" in caplog.text


def test_replaying_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stateless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([(torch.ones(4), number) for number in range(12)])

    script = plain_script(lambda: DataLoader(Stateless(), 4), epochs=1)
    attempt(script, tmp_path, 2)
    with caplog.at_level(logging.WARNING):
        attempt(script, tmp_path)
    assert "Replaying 2 batches" in caplog.text
    assert "state_dict" in caplog.text


def test_a_state_that_cannot_be_saved_is_refused_with_its_place() -> None:
    class Odd(Shards):
        def state_dict(self) -> dict[str, Any]:
            return {"file": object()}

    with pytest.raises(UnsupportedTypeError, match="file"):
        Accelerator(cpu=True).prepare(DataLoader(Odd(), 4))


def test_a_dataset_is_told_the_pass() -> None:
    class ToldStream(Told, IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch] * 2)

    for dataset in (Told(2), ToldStream(2)):
        loader = Accelerator(cpu=True).prepare(DataLoader(dataset, 2))
        assert [batch[0].item() for _ in range(3) for batch in loader] == [0, 1, 2]


class OwnState(DataLoader[Any]):
    """A loader that says itself where it is."""

    done = 0

    def __iter__(self) -> Any:
        for batch in list(super().__iter__())[self.done :]:
            self.done += 1
            yield batch
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def test_a_loader_with_a_state_of_its_own_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        loader = accelerator.prepare(OwnState(range(22), 4))
        tape.resume()
        for epoch in accelerator.epochs(2):
            for batch in loader:
                tape.note(epoch, batch.tolist())
        return {}

    assert_exact(script, tmp_path)
    assert "Replaying" not in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_of_torchdata(workers: int, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def stream() -> Any:
        return stateful.StatefulDataLoader(Plain(22), 4, num_workers=workers)

    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        loader = accelerator.prepare(stream())
        tape.resume()
        for epoch in accelerator.epochs(2):
            for batch in loader:
                tape.note(epoch, batch.tolist())
        return {}

    assert_exact(script, tmp_path / "stream", stops=range(1, 12, 2))
    mapped = plain_script(lambda: stateful.StatefulDataLoader(Noisy(), 4, shuffle=True, num_workers=workers))
    assert_exact(mapped, tmp_path / "mapped", stops=range(3, 10, 4))


class Plain(IterableDataset[Any]):
    """Numbers, shared between workers, with a state."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.start = self.done = 0

    def __iter__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        numbers = list(range(first, self.length, step))
        self.done, self.start = self.start, 0
        while self.done < len(numbers):
            self.done += 1
            yield numbers[self.done - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["done"]
