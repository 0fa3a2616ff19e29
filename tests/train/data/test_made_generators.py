"""Generators that data sets, collate functions and samplers make when they first draw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import Noisy, assert_exact, attempt, plain_script
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from transformers import BertTokenizer, DataCollatorForLanguageModeling

from keepstep import Accelerator

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *[f"word{number}" for number in range(50)]]


class Sentences(Dataset[Any]):
    """20 tokenized sentences of several lengths."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [2, *[5 + (index * 7 + word) % 50 for word in range(20 + index % 3)], 3]}


class SentenceStream(IterableDataset[Any]):
    """The same one after the other; shared between workers."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        for index in range(0 if info is None else info.id, 20, 1 if info is None else info.num_workers):
            yield Sentences()[index]


class StatefulSentences(SentenceStream):
    """The same, and it says where it is."""

    at = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < 20:
            self.at += 1
            yield Sentences()[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def masking() -> DataCollatorForLanguageModeling:
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})
    return DataCollatorForLanguageModeling(tokenizer, seed=42)


def masked(kind: Any, **options: Any) -> Any:
    """Two epochs of batches that the collator of transformers masks."""
    shuffle = None if issubclass(kind, IterableDataset) else True

    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        plain = DataLoader(kind(), 4, shuffle=shuffle, collate_fn=masking(), **options)
        loader = accelerator.prepare(plain)
        tape.resume()
        for epoch in accelerator.epochs(2):
            for batch in loader:
                tape.note(epoch, {name: value.tolist() for name, value in batch.items()})
        return {}

    return script


def test_masks_of_transformers_are_the_same_whoever_draws_them(tmp_path: Path) -> None:
    entries = assert_exact(masked(Sentences), tmp_path / "one", stops=range(1, 9, 3))
    assert any(label != -100 for _, batch in entries for row in batch["labels"] for label in row)
    for workers, stop in ((1, 2), (2, 6)):
        project = tmp_path / f"workers_{workers}"
        script = masked(Sentences, num_workers=workers)
        _, before = attempt(script, project, stop)
        _, between = attempt(script, project, 2)
        _, after = attempt(masked(Sentences), project)
        assert before + between + after == entries, f"{workers} workers"


@pytest.mark.parametrize("kind", [SentenceStream, StatefulSentences])
def test_masks_of_a_stream_go_on(kind: Any, tmp_path: Path) -> None:
    entries = assert_exact(masked(kind), tmp_path, stops=range(1, 10, 2))
    first, second = entries[0][1], entries[5][1]
    assert first["labels"] != second["labels"], "each pass has masks of its own"


class MadeInWorkers(Noisy):
    """Makes a generator with its first sample, each worker one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rng: Any = None

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.rng is None:
            info = get_worker_info()
            self.rng = np.random.default_rng(5 if info is None else info.seed)
        return torch.full((4,), float(self.rng.standard_normal())) + torch.rand(4) + random.random(), index


class MadeByTheFirstPass(Sampler[int]):
    """Makes its generator when it is first run; counts how often it is."""

    def __init__(self, length: int | None) -> None:
        self.length = length
        self.rng: random.Random | None = None
        self.times = 0

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("unknown")
        return self.length

    def __iter__(self) -> Iterator[int]:
        self.times += 1
        if self.rng is None:
            self.rng = random.Random(3)
        order = list(range(22))
        self.rng.shuffle(order)
        return iter(order[self.times :])


class Flip:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.rng.random()


class Transformed(Noisy):
    transform = Flip(1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(torch.ones(4)), index


def test_what_a_data_set_makes_in_its_workers(tmp_path: Path) -> None:
    entries = assert_exact(
        plain_script(lambda: DataLoader(MadeInWorkers(), 4)), tmp_path, stops=range(1, 9, 4)
    )
    alone = plain_script(lambda: DataLoader(MadeInWorkers(), 4, num_workers=2))
    assert attempt(alone, tmp_path / "workers")[1] == entries


@pytest.mark.parametrize("length", [22, None])
def test_what_a_sampler_makes_in_its_first_pass(length: int | None, tmp_path: Path) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(Noisy(), 4, sampler=MadeByTheFirstPass(length))

    entries = assert_exact(plain_script(loader), tmp_path, stops=range(4, 10, 2))
    assert [len(indices) for _, indices, *_ in entries if len(indices) < 4] == [1], "21 samples, then 20"


def test_a_transform_that_is_changed_between_epochs(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Any) -> dict[str, Any]:
        dataset = Transformed()
        loader = accelerator.prepare(DataLoader(dataset, 4))
        tape.resume()
        for epoch in accelerator.epochs(2):
            dataset.transform = Flip(epoch)
            for values, _ in loader:
                tape.note(epoch, values.tolist())
        return {}

    assert_exact(script, tmp_path, stops=range(5, 10, 2))
