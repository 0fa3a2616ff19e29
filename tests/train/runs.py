"""Training runs that can be interrupted after any micro-step, and what they leave behind.

A run is a function of (Accelerator, Tape). It calls `tape.note(...)` after each micro-step; the tape records
what was noted, and saves and raises `Interrupted` when its time has come. A resumed run is the same function
with objects built anew, as a fresh process would.
"""

# ruff: noqa: NPY002 - NumPy's global generator is one of those that have to be exact
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from keepstep import Accelerator


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The process is gone, as far as the run can tell."""


@dataclass
class Tape:
    """What a run did, and when it is to be cut off."""

    accelerator: Accelerator
    stop_after: int | None = None
    entries: list[Any] = field(default_factory=list)
    noted: int = 0

    def resume(self) -> None:
        """Resume, as a process that has used its generators before."""
        checkpoints = Path(str(self.accelerator.project_dir)) / "checkpoints"
        if checkpoints.exists():
            disturb()
        self.accelerator.resume()

    def note(self, *what: Any) -> None:
        """Record a micro-step; save and stop if it was the last one."""
        self.entries.append(what)
        self.noted += 1
        if self.noted == self.stop_after:
            self.accelerator.save_state()
            raise Interrupted


Script = Callable[[Accelerator, Tape], dict[str, Any]]
Make = Callable[[Path], Accelerator]


def default_make(project: Path) -> Accelerator:
    return Accelerator(cpu=True, project_dir=project)


def disturb() -> None:
    """Leave the global generators where no earlier process had them."""
    seed = random.SystemRandom().randrange(1 << 30)
    torch.manual_seed(seed)
    np.random.seed(seed)
    np.random.randn()
    random.seed(seed)


def attempt(
    script: Script, project: Path, stop_after: int | None = None, make: Make = default_make
) -> tuple[dict[str, Any] | None, list[Any]]:
    """One process: build everything from scratch and run until the end or the interruption."""
    torch.manual_seed(17)
    random.seed(17)
    np.random.seed(17)
    accelerator = make(project)
    tape = Tape(accelerator, stop_after)
    try:
        result = script(accelerator, tape)
    except Interrupted:
        return None, tape.entries
    return result, tape.entries


def assert_same(left: Any, right: Any, path: str = "result") -> None:
    """Equal in every bit, nested."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for index, (mine, other) in enumerate(zip(left, right, strict=True)):
            assert_same(mine, other, f"{path}[{index}]")
    else:
        assert left == right or left != left, path


def assert_exact(
    script: Script, tmp_path: Path, *, make: Make = default_make, stops: Iterator[int] | range | None = None
) -> list[Any]:
    """Run once whole, then once for each micro-step with an interruption after it."""
    whole, entries = attempt(script, tmp_path / "whole", make=make)
    assert whole is not None
    for stop in stops if stops is not None else range(1, len(entries)):
        if stop >= len(entries):
            break
        project = tmp_path / f"stopped_{stop}"
        nothing, before = attempt(script, project, stop, make=make)
        assert nothing is None
        result, after = attempt(script, project, make=make)
        assert before + after == entries, f"stopped after {stop}"
        assert_same(result, whole, f"stopped after {stop}")
    return entries


def outcome(model: torch.nn.Module, *optimizers: Any) -> dict[str, Any]:
    """Copies of everything that training changed."""
    return {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "rng": (torch.rand(2), random.random(), np.random.rand()),
    }


class Noisy(Dataset[Any]):
    """Samples with random augmentation from all three global generators."""

    def __init__(self, length: int = 22) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(4) + float(np.random.randn()) + random.random()
        return torch.full((4,), float(index)) / 10 + noise, index


class Told(Noisy):
    """Gives the pass that it was told."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        return self.epoch


class CountedLoads(Noisy):
    """Counts the samples that were loaded in this process."""

    def __init__(self, length: int = 22) -> None:
        super().__init__(length)
        self.loads = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.loads += 1
        return super().__getitem__(index)


class OwnGenerator(Noisy):
    """Keeps a generator for itself, as modern NumPy code does."""

    def __init__(self, length: int = 22) -> None:
        super().__init__(length)
        self.rng = np.random.default_rng(3)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((4,), float(index)) + float(self.rng.standard_normal()), index


def noisy_collate(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collates with randomness of its own."""
    inputs = torch.stack([sample for sample, _ in samples])
    return inputs + random.random() * torch.rand(1), torch.tensor([index for _, index in samples])


class GlobalSampler(Sampler[int]):
    """Draws from the global generators, knows its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        random.shuffle(order)
        return iter(order)


class CountingSampler(GlobalSampler):
    """Counts its own passes, as samplers without set_epoch do."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.times = 0

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.times)
        self.times += 1
        return iter(torch.randperm(self.length, generator=generator).tolist())


class EpochSampler(GlobalSampler):
    """A function of what set_epoch told it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class KeepingSampler(GlobalSampler):
    """Keeps a generator whose state depends on all earlier passes."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.rng = np.random.default_rng(5)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(self.length).tolist())


class StatefulSampler(GlobalSampler):
    """Has hidden state, and says it."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self._hidden = [1]

    def state_dict(self) -> dict[str, Any]:
        return {"hidden": list(self._hidden)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._hidden = list(state["hidden"])

    def __iter__(self) -> Iterator[int]:
        self._hidden.append(self._hidden[-1] * 3 % 101)
        seed = self._hidden[-1]
        return iter(torch.randperm(self.length, generator=torch.Generator().manual_seed(seed)).tolist())


class UnsizedSampler(Sampler[int]):
    """Doesn't know its length, and draws as it goes."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            yield int(torch.randint(self.length, ()))


class BucketBatches:
    """A batch sampler of its own: batches of several sizes, drawn from NumPy's global generator."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return (self.length + 3) // 4

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.permutation(self.length).tolist()
        for begin in range(0, self.length, 4):
            yield order[begin : begin + 4]


def small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.3), torch.nn.Linear(6, 1))


def plain_script(
    make_loader: Callable[[], DataLoader[Any]], *, epochs: int = 2, clip: bool = False
) -> Script:
    """The ordinary training loop over a loader."""

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), scheduler)
        tape.resume()
        for epoch in accelerator.epochs(epochs):
            for inputs, indices in loader:
                with accelerator.accumulate(model):
                    loss = model(inputs).pow(2).mean()
                    accelerator.backward(loss)
                    if clip:
                        accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
                tape.note(epoch, indices.tolist(), loss.item(), scheduler.get_last_lr())
        return outcome(model, optimizer)

    return script


def batches_of(sampler: Any) -> BatchSampler:
    return BatchSampler(sampler, 4, drop_last=False)


def shuffled(length: int) -> RandomSampler:
    return RandomSampler(range(length))
