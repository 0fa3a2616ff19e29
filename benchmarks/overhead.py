"""What keepstep costs when there is nothing to do."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import steps
from benchmarks.measure import median_us_per_call
from benchmarks.report import Bar, at_most, show_table, status
from benchmarks.settings import Settings
from keepstep.checkpoint.format.manifest import MANIFEST_NAME, dump_manifest
from keepstep.checkpoint.keeping.catalog import checkpoint_name
from keepstep.checkpoint.store import Store
from keepstep.train.accelerator import Accelerator
from keepstep.train.settings.config import CheckpointPolicy

__all__ = ["many_checkpoints", "run"]

_SAMPLES = 32_000
_BATCH = 32
_PASSES = 5


def run(settings: Settings) -> list[Bar]:
    """Print the table; return the bars."""
    never_due = _checkpoint_us(settings, CheckpointPolicy(every_n_steps=1_000_000_000))
    by_time = _checkpoint_us(settings, CheckpointPolicy(every_s=1e9))
    with status("overhead: starting processes"):
        starts = settings.size.starts
        interpreter_ms = _median_process_s([sys.executable, "-c", "pass"], starts) * 1e3
        import_ms = _import_ms(starts)
    with status("overhead: keepstep ls"):
        listing_s = _listing_s(settings)
    with status("overhead: loaders"):
        plain_us, prepared_us = _batch_us(settings)
    rows = [
        ("accelerator.checkpoint(), every_n_steps, not due", f"{never_due:.2f} us"),
        ("accelerator.checkpoint(), every_s, not due", f"{by_time:.2f} us"),
        ("import keepstep", f"{import_ms:.1f} ms"),
        ("floor: start and end of the interpreter", f"{interpreter_ms:.1f} ms"),
        (f"keepstep ls, {settings.size.checkpoints:,} checkpoints, whole process", f"{listing_s:.3f} s"),
        (f"plain DataLoader, a batch of {_BATCH}, no workers", f"{plain_us:.1f} us"),
        ("prepared loader, the same batches", f"{prepared_us:.1f} us"),
    ]
    show_table("Overhead", ("what", "time"), rows)
    with_facade = steps.run(max(3, settings.size.calls // 1_000))
    count = f"{settings.size.checkpoints:,}"
    return [
        at_most("checkpoint() when nothing is due", max(never_due, by_time), 20, " us"),
        at_most("import keepstep", import_ms, 50, " ms", digits=1),
        at_most(f"keepstep ls over {count} checkpoints", listing_s, 0.5, " s", digits=3),
        at_most("prepared loader: added to a batch", prepared_us - plain_us, 40, " us", digits=1),
        *with_facade,
    ]


# --------------------------------------------------------------------------------- nothing due


def _checkpoint_us(settings: Settings, policy: CheckpointPolicy) -> float:
    """A call of checkpoint() when a step was done since the last one, and still none is wanted."""
    project = settings.directory / f"project_{len(list(settings.directory.iterdir()))}"
    accelerator = Accelerator(cpu=True, project_dir=str(project), checkpoint_policy=policy)
    model = torch.nn.Linear(8, 8)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.rand(4, 8)).sum())
    optimizer.step()
    with status("overhead: checkpoint() when nothing is due"):
        took = median_us_per_call(accelerator.checkpoint, settings.size.calls)
    accelerator.end_training()
    return took


# ---------------------------------------------------------------------------------- processes


def _median_process_s(command: list[str], times: int) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _import_ms(times: int) -> float:
    """Milliseconds of the import statement itself, each in a fresh interpreter."""
    code = "import time; t = time.perf_counter(); import keepstep; print(time.perf_counter() - t)"
    taken = [
        float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
        for _ in range(times)
    ]
    return statistics.median(taken) * 1e3


def _listing_s(settings: Settings) -> float:
    root = settings.directory / "listed"
    many_checkpoints(root, settings.size.checkpoints)
    command = [str(Path(sys.executable).with_name("keepstep")), "ls", str(root)]
    return _median_process_s(command, max(1, settings.size.starts // 2))


def many_checkpoints(root: Path, count: int) -> None:
    """One checkpoint saved, the others made from it: each with a manifest and an id of its own."""
    first = Store(root).save({"model": torch.nn.Linear(8, 8)}, step=0, metrics={"val_loss": 4.0})
    for number in range(1, count):
        manifest = dataclasses.replace(
            first.manifest,
            id=f"{number:016x}",
            step=number,
            parent=f"{number - 1:016x}",
            metrics={"val_loss": 4 / (number + 1)},
        )
        directory = root / checkpoint_name(number)
        directory.mkdir()
        for name in first.manifest.files:
            (directory / name).hardlink_to(first.path / name)
        (directory / MANIFEST_NAME).write_bytes(dump_manifest(manifest))


# ------------------------------------------------------------------------------------ batches


def _batch_us(settings: Settings) -> tuple[float, float]:
    """Microseconds a batch takes: a plain loader and a prepared one, in turns."""
    samples = _SAMPLES if settings.size.calls > 1_000 else 10 * _BATCH
    dataset = TensorDataset(torch.rand(samples, 16))
    plain = DataLoader(dataset, batch_size=_BATCH, shuffle=True)
    accelerator = Accelerator(cpu=True)
    prepared: Any = accelerator.prepare(DataLoader(dataset, batch_size=_BATCH, shuffle=True))
    batches = samples // _BATCH
    taken: dict[str, list[float]] = {"plain": [], "prepared": []}
    for _ in range(_PASSES):
        for name, loader in (("plain", plain), ("prepared", prepared)):
            taken[name].append(_seconds(lambda loader=loader: _drain(loader)) / batches * 1e6)  # type: ignore[misc]
    return statistics.median(taken["plain"]), statistics.median(taken["prepared"])


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _drain(batches: Iterable[object]) -> None:
    for _ in batches:
        pass
