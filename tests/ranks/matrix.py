"""Training runs of many kinds, for one process or several ranks: whole, left off, and gone on with.

Each run of a cell notes which samples each rank saw, and ends in a digest of everything that training made.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from keepstep import Accelerator, CheckpointPolicy
from keepstep.train.settings.config import DataLoaderConfiguration

SAMPLES, BATCH, EPOCHS = 28, 2, 2
SOURCES = ("map", "iterable with state", "iterable without", "custom sampler", "dispatch")

Cell = dict[str, Any]


def all_cells() -> list[Cell]:
    """Every combination, with the batch after which its run is left off."""
    draw = random.Random(7)
    cells = []
    axes = (("no", "bf16", "fp16"), (0, 2), (1, 3), SOURCES)
    for precision, workers, accumulation, source in itertools.product(*axes):
        if source == "iterable with state" and workers:
            continue  # its state is in the worker: replayed, as "iterable without"
        cells.append(
            {
                "precision": precision,
                "workers": workers,
                "accumulation": accumulation,
                "source": source,
                "leave_after": draw.choice([1, 2, 3, 4, 5, 6, 7, 10, 11, 12]),
            }
        )
    return cells


class Samples(Dataset[Any]):
    """Random, so that what a worker draws counts."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.full((8,), float(index)) / SAMPLES + torch.randn(8) * 0.1


class Stream(IterableDataset[Any]):
    """Shared out between workers."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        data = Samples()
        for index in range(first, SAMPLES, step):
            yield data[index]


class StatefulStream(Stream):
    """Knows where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Any]:
        data = Samples()
        while self.at < SAMPLES:
            self.at += 1
            yield data[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Odd(Sampler[int]):
    """A sampler with an order and a generator of its own."""

    def __init__(self) -> None:
        self.draw = random.Random(3)

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        order = list(range(SAMPLES))
        self.draw.shuffle(order)
        return iter(order)


def loader_of(cell: Cell) -> DataLoader[Any]:
    options: dict[str, Any] = {"batch_size": BATCH, "num_workers": cell["workers"]}
    if cell["workers"]:
        options["multiprocessing_context"] = "fork"
    match cell["source"]:
        case "iterable with state":
            return DataLoader(StatefulStream(), **options)
        case "iterable without":
            return DataLoader(Stream(), **options)
        case "custom sampler":
            return DataLoader(Samples(), sampler=Odd(), **options)
        case _:
            return DataLoader(Samples(), shuffle=True, **options)


class Net(nn.Module):
    """With dropout, and statistics that differ between ranks; registered in another order than it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.nn.functional.dropout(self.norm(torch.relu(self.inner(x))), 0.1, self.training)
        return self.out(hidden)  # type: ignore[no-any-return]


def train(cell: Cell, place: Path, leave_after: int | None) -> dict[str, Any]:
    """Train a cell, or leave it off after so many batches, or go on with it."""
    torch.manual_seed(0)
    random.seed(0)
    accelerator = Accelerator(
        cpu=True,
        project_dir=place,
        mixed_precision=cell["precision"],
        gradient_accumulation_steps=cell["accumulation"],
        dataloader_config=DataLoaderConfiguration(
            dispatch_batches=cell["source"] == "dispatch" if cell["source"] != "iterable without" else False
        ),
        checkpoint_policy=CheckpointPolicy(every_n_steps=1, keep_last=2),
    )
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader_of(cell), scheduler)
    resumed = accelerator.resume()
    seen: list[list[int]] = []
    for _epoch in accelerator.epochs(EPOCHS):
        for indices, x in loader:
            seen.append(indices.tolist())
            with accelerator.accumulate(model):
                loss = model(x).float().square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            accelerator.checkpoint()
            if len(seen) == leave_after:
                accelerator.wait_for_checkpoint()  # the next run is in another process
                return {"seen": seen}
    accelerator.end_training()
    return {
        "seen": seen,
        "step": accelerator.step,
        "resumed at": None if resumed is None else resumed.step,
        "end": digest(accelerator.unwrap_model(model), optimizer, scheduler),
    }


def digest(model: nn.Module, optimizer: Any, scheduler: Any) -> str:
    """Of all that training made: parameters, statistics, moments, learning rate, generators."""
    made = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        made.update(name.encode() + value.contiguous().numpy().tobytes())
    for state in optimizer.state_dict()["state"].values():
        for name, value in sorted(state.items()):
            made.update(name.encode() + torch.as_tensor(value).numpy().tobytes())
    made.update(repr(scheduler.get_last_lr()).encode())
    made.update(torch.rand(4).numpy().tobytes() + repr(random.random()).encode())
    return made.hexdigest()


def run(argument: str, rank: int, size: int) -> None:
    """Train cells one after the other: ("whole" | "left" | "resumed", cells, folder)."""
    what, cells, folder = json.loads(argument)
    results = []
    for number, cell in enumerate(cells):
        place = Path(folder) / ("whole" if what == "whole" else "left") / str(number)
        results.append(train(cell, place, cell["leave_after"] if what == "left" else None))
    (Path(folder) / f"{what}-{rank}.json").write_text(json.dumps(results))
