"""Loaders on several ranks: every sample once, the same bytes, and on with another number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks.spawn import run_ranks
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from keepstep import Accelerator
from keepstep.utils import DataLoaderConfiguration

LENGTH = 46
BATCH = 4


class Numbered(Dataset[Any]):
    """Samples that say which one they are, with noise."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.rand(2)


class Stream(IterableDataset[Any]):
    """The same without positions."""

    def __init__(self, length: int = LENGTH) -> None:
        self.length = length

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.length):
            yield index, torch.rand(2)


class StatefulStream(IterableDataset[Any]):
    """The same, and it says where it is; counts what it read."""

    def __init__(self) -> None:
        self.at = 0
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        while self.at < LENGTH:
            self.at += 1
            self.read += 1
            yield self.at - 1, torch.rand(2)
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": torch.tensor(self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = int(state["at"])


class Buckets:
    """A batch sampler of its own, with batches of several sizes."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(LENGTH).tolist()
        begin = 0
        for number in range(12):
            size = 2 + number % 5 if number < 11 else LENGTH
            yield order[begin : begin + size]
            begin += size


class Unsized(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(LENGTH).tolist()


ON_FOUR = ("shuffled", "split", "buckets", "unsized", "stream", "stream split", "stateful")
"""Four processes on two cores are slow; the other kinds go from two ranks to one."""

Kind = tuple[Any, dict[str, Any]]


def kinds() -> dict[str, Kind]:
    """Loaders of every kind, and how they are shared out."""
    return {
        "shuffled": (DataLoader(Numbered(), BATCH, shuffle=True), {}),
        "workers": (DataLoader(Numbered(), BATCH, shuffle=True, num_workers=2), {}),
        "split": (DataLoader(Numbered(), BATCH, shuffle=True), {"split_batches": True}),
        "uneven": (DataLoader(Numbered(), BATCH, shuffle=True), {"even_batches": False}),
        "buckets": (DataLoader(Numbered(), batch_sampler=Buckets()), {}),
        "unsized": (DataLoader(Numbered(), BATCH, sampler=Unsized()), {}),
        "map dispatched": (DataLoader(Numbered(), BATCH, shuffle=True), {"dispatch_batches": True}),
        "stream": (DataLoader(Stream(), BATCH), {}),
        "stream, workers": (DataLoader(Stream(), BATCH, num_workers=1), {}),
        "stream split": (DataLoader(Stream(), BATCH), {"split_batches": True}),
        "stream uneven": (DataLoader(Stream(), BATCH), {"even_batches": False}),
        "stream everywhere": (DataLoader(Stream(), BATCH), {"dispatch_batches": False}),
        "stateful": (DataLoader(StatefulStream(), BATCH), {}),
        "stateful split": (DataLoader(StatefulStream(), BATCH), {"split_batches": True}),
        "stateful everywhere": (DataLoader(StatefulStream(), BATCH), {"dispatch_batches": False}),
    }


def make(project: Path, options: dict[str, Any]) -> Accelerator:
    config = DataLoaderConfiguration(data_seed=7, **options)
    return Accelerator(cpu=True, project_dir=project, dataloader_config=config)


def train_a_while(argument: str, rank: int, size: int) -> None:
    """Go on with each loader for a few batches, save, and stop; on one process, to the end."""
    directory, batches = argument.split("|")
    for name, (plain, options) in kinds().items():
        if size == 4 and name not in ON_FOUR:
            continue
        project = Path(directory) / name.replace(", ", "_").replace(" ", "_")
        accelerator = make(project, options)
        loader = accelerator.prepare(plain)
        resumed = accelerator.resume() is not None
        records = []
        for indices, noise in loader:
            record = {"rank": rank, "size": size, "indices": indices.tolist(), "noise": noise.tolist()}
            state = accelerator.gradient_state
            record |= {"end": state.end_of_dataloader, "remainder": state.remainder}
            records.append(record)
            if len(records) == int(batches):
                accelerator.save_state()
                break
        with (project / f"seen_{size}_{rank}.json").open("w") as file:
            json.dump(records, file)
        if resumed and name.startswith("stateful"):
            reads = plain.dataset.read
            own = sum(len(record["indices"]) for record in records)
            assert reads <= (own + 4 * BATCH if size == 1 else size * BATCH * (int(batches) + 2)), (
                name,
                reads,
            )
            assert rank == 0 or "everywhere" in name or reads == 0, name
        accelerator.end_training()


@pytest.mark.timeout(400)
def test_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    for size, batches in ((2, 2), (4, 1), (1, -1)):
        run_ranks(Path(__file__), "train_a_while", size, f"{tmp_path}|{batches}", timeout_s=150)
    for name, (plain, options) in kinds().items():
        project = tmp_path / name.replace(", ", "_").replace(" ", "_")
        seen: Counter[int] = Counter()
        noises = {}
        for file in sorted(project.glob("seen_*.json")):
            for record in json.loads(file.read_text()):
                seen.update(record["indices"])
                noises.update(zip(record["indices"], record["noise"], strict=True))
        assert seen == Counter(range(LENGTH)), name
        if "split" in name and "stream" not in name and "stateful" not in name:
            continue  # what is drawn for a part depends on the cut
        alone = make(tmp_path / "alone" / project.name, options).prepare(plain)
        expected = {}
        for indices, noise in alone:
            expected.update(zip(indices.tolist(), noise.tolist(), strict=True))
        assert noises == expected, name
