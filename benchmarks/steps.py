"""One optimizer step of a small model: written by hand, with keepstep's facade, and with Accelerate's.

The three do the same arithmetic in the same loop: a batch of a loader, `accumulate`, forward, backward,
clipping, `step`, the scheduler's step, `zero_grad`. What a facade adds to the loop by hand is its cost. It is
measured with a TensorDataset, which draws nothing, and with a data set of one's own, which might.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import accelerate
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.report import Bar, at_most, show_table, status
from keepstep.train.accelerator import Accelerator

__all__ = ["run"]

_BATCH = 8
_WIDTH = 16
_MAX_NORM = 1.0
_STRETCH = 100
_STEPS_OF_A_PASS = 2000


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Microseconds a step takes, over a stretch of them."""

    wall_us: float
    cpu_us: float


def run(rounds: int) -> list[Bar]:
    """Print the table; return the bars.

    Args:
        rounds: stretches of steps of each contender, in turns, so that noise hits all of them alike.
    """
    tensors = _added(_of_tensors, rounds, "a TensorDataset")
    own = _added(_Own, rounds, "a data set of one's own")
    return [
        at_most("facade: CPU time added to a step", tensors["keepstep"], 50, " us", digits=1),
        at_most("facade: the same, data set of one's own", own["keepstep"], 50, " us", digits=1),
        at_most("facade: added, to Accelerate's", tensors["keepstep"] / tensors["accelerate"], 1.0, "x"),
    ]


def _added(data: Callable[[torch.Tensor], Dataset[Any]], rounds: int, what: str) -> dict[str, float]:
    """Print the table for one kind of data set; return the microseconds of CPU time each contender adds."""
    contenders: dict[str, Iterator[None]] = {
        "by hand": _by_hand(data),
        "keepstep": _with_facade(Accelerator(cpu=True), data),
        "accelerate": _with_facade(accelerate.Accelerator(cpu=True), data),
    }
    costs: dict[str, list[Cost]] = defaultdict(list)
    for one in contenders.values():
        _cost(one)  # first steps make the optimizer's state
    gc.collect()
    with status(f"a step of a small model, {what}"):
        for number in range(rounds):
            for name in contenders if number % 2 == 0 else reversed(contenders):
                costs[name].append(_cost(contenders[name]))
    added = {name: _added_us(costs[name], costs["by hand"]) for name in contenders}
    show_table(
        f"A step of a small model, batches of {_BATCH} of {what}, one process",
        ("loop", "wall", "CPU", "least CPU", "CPU added to the loop by hand"),
        [(name, *_medians(costs[name]), f"{added[name]:+.1f} us") for name in contenders],
    )
    return added


def _medians(costs: list[Cost]) -> tuple[str, str, str]:
    wall = statistics.median(one.wall_us for one in costs)
    cpu = statistics.median(one.cpu_us for one in costs)
    return f"{wall:.1f} us", f"{cpu:.1f} us", f"{min(one.cpu_us for one in costs):.1f} us"


def _added_us(mine: list[Cost], by_hand: list[Cost]) -> float:
    """Median over the rounds of the difference within a round; CPU time, as others may use the machine."""
    return statistics.median(one.cpu_us - other.cpu_us for one, other in zip(mine, by_hand, strict=True))


def _cost(steps: Iterator[None]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(_STRETCH):
        next(steps)
    return Cost(
        wall_us=(time.perf_counter() - wall) / _STRETCH * 1e6,
        cpu_us=(time.process_time() - cpu) / _STRETCH * 1e6,
    )


class _Own(Dataset[Any]):
    """Rows of a tensor, by a class that the loader knows nothing of."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        return (self._rows[index],)


def _of_tensors(rows: torch.Tensor) -> Dataset[Any]:
    return TensorDataset(rows)


def _parts(data: Callable[[torch.Tensor], Dataset[Any]]) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(_WIDTH, _WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1000, gamma=0.9)
    dataset = data(torch.rand(_STEPS_OF_A_PASS * _BATCH, _WIDTH))
    return model, optimizer, scheduler, DataLoader(dataset, batch_size=_BATCH, shuffle=True)


def _by_hand(data: Callable[[torch.Tensor], Dataset[Any]]) -> Iterator[None]:
    model, optimizer, scheduler, loader = _parts(data)
    while True:
        for (batch,) in loader:
            model(batch).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            yield


def _with_facade(accelerator: Any, data: Callable[[torch.Tensor], Dataset[Any]]) -> Iterator[None]:
    """Both facades have the same names, so their loop is one text."""
    model, optimizer, scheduler, loader = accelerator.prepare(*_parts(data))
    while True:
        for (batch,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), _MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            yield
