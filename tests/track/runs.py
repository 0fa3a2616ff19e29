"""A small training that logs every step, as one attempt of a run; and what is left of its curve."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from keepstep import Accelerator
from keepstep.track import Log, read_log

STEPS = 8


class Killed(Exception):  # noqa: N818 - nothing went wrong
    """The process is gone, as far as the run can tell."""


def training(accelerator: Accelerator) -> tuple[Any, Any, Any]:
    torch.manual_seed(3)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(torch.randn(STEPS * 2, 3))
    loader = DataLoader(data, batch_size=2, shuffle=True)
    return tuple(accelerator.prepare(model, optimizer, loader))  # type: ignore[return-value]


def attempt(
    project: Path,
    *,
    saves: set[int] = frozenset(),  # type: ignore[assignment]
    dies_at: int | None = None,
    init_first: bool = True,
    log_with: Any = None,
    init_kwargs: dict[str, dict[str, Any]] | None = None,
    on_start: Callable[[Accelerator], None] | None = None,
    epochs: int = 1,
    stop_after: int = 10**9,
) -> Accelerator:
    """One process: trains `epochs`, saves after the steps named, and is gone after `dies_at` steps."""
    accelerator = Accelerator(cpu=True, project_dir=project, log_with=log_with)
    model, optimizer, loader = training(accelerator)
    config = {"lr": 0.1, "layers": [3, 1], "nested": {"name": "x"}, "none": None}
    if init_first:
        accelerator.init_trackers("curve", config, init_kwargs or {})
    accelerator.resume()
    if not init_first:
        accelerator.init_trackers("curve", config, init_kwargs or {})
    if on_start is not None:
        on_start(accelerator)
    for _ in accelerator.epochs(epochs):
        for (x,) in loader:
            loss = model(x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({"loss": loss, "lr": 0.1}, step=accelerator.step)
            if accelerator.step in saves:
                accelerator.save_state()
            if accelerator.step == dies_at:
                raise Killed
            if accelerator.step >= stop_after:
                break
        accelerator.log({"eval": {"accuracy": 0.5, "step": accelerator.step}}, step=accelerator.step)
    accelerator.end_training()
    return accelerator


def killed(project: Path, **options: Any) -> None:
    try:
        attempt(project, **options)
    except Killed:
        return
    raise AssertionError("it was not killed")


def curve(log: Log) -> list[tuple[int, Any]]:
    return [(row.step, row.values) for row in log]


def whole(directory: Path) -> list[tuple[int, Any]]:
    """The curve of a run that nothing happened to."""
    attempt(directory, saves={2})
    return curve(read_log(directory))
