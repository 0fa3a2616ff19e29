"""One training, three times: by hand on plain PyTorch, with keepstep's Accelerator, and with Hugging Face's.

The order of samples is the sequential one, so that all three see the same batches. Both Accelerators run one
text, as they have the same names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import keepstep
import keepstep.utils

BATCH = 4
FEATURES = 6


@dataclass(frozen=True, kw_only=True)
class Case:
    samples: int = 32
    epochs: int = 2
    window: int = 1
    precision: str = "no"
    max_norm: float | None = None
    scheduled: bool = False
    split: bool = False


CASES = {
    "each batch a step": Case(),
    "windows with a shorter last one": Case(samples=28, window=3),
    "a shorter last batch": Case(samples=26),
    "a shorter last batch that is split": Case(samples=26, split=True),
    "scheduler over whole batches": Case(scheduled=True),
    "scheduler over split batches": Case(scheduled=True, split=True),
    "bf16": Case(precision="bf16"),
    "clipped": Case(max_norm=0.05),
    "all of it": Case(samples=26, window=2, precision="bf16", max_norm=0.05, scheduled=True),
}


@dataclass(kw_only=True)
class Trace:
    """What a training did: one entry a micro-batch, and what it ended in."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    weights: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    evaluated: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def write_trace(trace: Trace, path: Path) -> None:
    torch.save(vars(trace), path)


def read_trace(path: Path) -> Trace:
    return Trace(**torch.load(path))


def parts(case: Case) -> tuple[Any, Any, Any, DataLoader[Any]]:
    torch.manual_seed(3)
    hidden = torch.nn.Linear(FEATURES, 16)
    model = torch.nn.Sequential(hidden, torch.nn.LayerNorm(16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    inputs = torch.randn(case.samples, FEATURES)
    dataset = TensorDataset(inputs, inputs[:, :3].argmax(dim=1))
    return model, optimizer, scheduler, DataLoader(dataset, batch_size=BATCH)


def row(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def with_facade(accelerator: Any, case: Case) -> Trace:
    model, optimizer, scheduler, plain_loader = parts(case)
    model, optimizer, loader = accelerator.prepare(model, optimizer, plain_loader)
    if case.scheduled:
        scheduler = accelerator.prepare(scheduler)
    trace = Trace()
    for _epoch in range(case.epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if case.max_norm is not None and accelerator.sync_gradients:
                    trace.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), case.max_norm)))
                optimizer.step()
                if case.scheduled:
                    scheduler.step()
                optimizer.zero_grad()
            trace.losses.append(loss.item())
            trace.rates.append(optimizer.param_groups[0]["lr"])
    trace.weights = row(accelerator.unwrap_model(model))
    with torch.no_grad():
        outputs = [accelerator.gather_for_metrics(model(inputs)) for inputs, _targets in loader]
    trace.evaluated = torch.cat(outputs)
    return trace


def own_batches(dataset: Any, case: Case, rank: int, size: int) -> Iterator[Any]:
    """A rank's batches; what a step of all ranks lacks at the end is filled up from the beginning."""
    together = BATCH if case.split else BATCH * size
    indices = list(range(len(dataset)))
    if size > 1:
        indices += indices[: -len(indices) % together]
    mine = BATCH // size if case.split else BATCH
    units = [indices[at : at + mine] for at in range(0, len(indices), mine)]
    for unit in units[rank::size]:
        inputs, targets = zip(*(dataset[index] for index in unit), strict=True)
        yield torch.stack(inputs), torch.stack(targets)


def by_hand(case: Case, rank: int, size: int) -> Trace:
    bare, optimizer, scheduler, loader = parts(case)
    model = DistributedDataParallel(bare) if size > 1 else bare
    precision = torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16")
    trace = Trace()
    for _epoch in range(case.epochs):
        batches = list(own_batches(loader.dataset, case, rank, size))
        for number, (inputs, targets) in enumerate(batches, 1):
            complete = number % case.window == 0 or number == len(batches)
            with nullcontext() if complete or size == 1 else model.no_sync():
                with precision:
                    outputs = model(inputs)
                loss = torch.nn.functional.cross_entropy(outputs.float(), targets)
                (loss / case.window).backward()
            if complete:
                if case.max_norm is not None:
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
                    trace.norms.append(norm.item())
                optimizer.step()
                for _ in range((1 if case.split else size) if case.scheduled else 0):
                    scheduler.step()
                optimizer.zero_grad()
            trace.losses.append(loss.item())
            trace.rates.append(optimizer.param_groups[0]["lr"])
    trace.weights = row(bare)
    with torch.no_grad(), precision:
        outputs = [bare(torch.stack(inputs)).float() for inputs, _targets in _whole_batches(loader.dataset)]
    trace.evaluated = torch.cat(outputs)
    return trace


def _whole_batches(dataset: Any) -> Iterator[Any]:
    for at in range(0, len(dataset), BATCH):
        yield tuple(zip(*(dataset[index] for index in range(at, min(at + BATCH, len(dataset)))), strict=True))


def ours(case: Case) -> Trace:
    return with_facade(
        keepstep.Accelerator(
            cpu=True,
            mixed_precision=case.precision,
            gradient_accumulation_steps=case.window,
            dataloader_config=keepstep.utils.DataLoaderConfiguration(split_batches=case.split),
        ),
        case,
    )


def theirs(case: Case) -> Trace:
    forget_their_states()
    return with_facade(
        accelerate.Accelerator(
            cpu=True,
            mixed_precision=case.precision,
            gradient_accumulation_steps=case.window,
            dataloader_config=accelerate.utils.DataLoaderConfiguration(split_batches=case.split),
        ),
        case,
    )


def forget_their_states() -> None:
    """A process has one state of Accelerate, and another precision is refused."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._reset_state()


def ranks_with_keepstep_and_by_hand(directory: str, rank: int, size: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    for number, case in enumerate(CASES.values()):
        write_trace(by_hand(case, rank, size), Path(directory, f"by_hand_{number}_{rank}"))
        write_trace(ours(case), Path(directory, f"ours_{number}_{rank}"))


def ranks_with_accelerate(directory: str, rank: int, size: int) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    for number, case in enumerate(CASES.values()):
        write_trace(theirs(case), Path(directory, f"theirs_{number}_{rank}"))
