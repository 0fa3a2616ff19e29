"""Many small tensors: the time must grow as their number does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.measure import Contender, Rounds, interleaved
from benchmarks.methods import fsync_all, remove
from benchmarks.report import Bar, at_most, note, show_table
from benchmarks.settings import Settings
from benchmarks.workload import small_tensors
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint

__all__ = ["fitted_exponent", "run"]

_EXPONENT_LIMIT = 1.1
_MOST_ROUNDS = 3
_ROUNDS_TIMES_TENSORS = 60_000


def run(settings: Settings) -> list[Bar]:
    """Print the curve; return the bars."""
    counts = settings.size.tensor_counts
    curve = {count: _at(settings, count) for count in counts}
    rows = [
        (f"{count:,} {operation}", *_cells(curve[count], operation, count))
        for count in counts
        for operation in ("save", "load")
    ]
    columns = ("tensors of 64 floats", "keepstep s", "us each", "torch s", "us each", "dcp s", "us each")
    show_table("Small tensors; saves durable, loads warm and into live tensors", columns, rows)
    if settings.size.dcp_up_to < max(counts):
        note(f"dcp is left out beyond {settings.size.dcp_up_to:,} tensors: it would take minutes.")
    bars = []
    for operation in ("save", "load"):
        times = {count: curve[count].median_s(f"keepstep {operation}") for count in counts}
        exponent = fitted_exponent(times)
        note(f"keepstep {operation}: time grows as count ** {exponent:.2f}")
        bars.append(at_most(f"small tensors, {operation}: exponent of growth", exponent, _EXPONENT_LIMIT, ""))
    return bars


def fitted_exponent(times_s: dict[int, float]) -> float:
    """The slope of log time over log count, least squares: 1 is linear.

    Of four or more points the smallest is left out: it measures the fixed cost of a save.
    """
    points = sorted(times_s.items())[1 if len(times_s) > 3 else 0 :]
    xs = [math.log(count) for count, _ in points]
    ys = [math.log(seconds) for _, seconds in points]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread


def _cells(rounds: Rounds, operation: str, count: int) -> list[str]:
    cells: list[str] = []
    for name in ("keepstep", "torch", "dcp"):
        if (f"{name} {operation}", "done") in rounds.times:
            seconds = rounds.median_s(f"{name} {operation}")
            cells += [f"{seconds:.3f}", f"{seconds / count * 1e6:.0f}"]
        else:
            cells += ["", ""]
    return cells


def _at(settings: Settings, count: int) -> Rounds:
    state = {"tensors": small_tensors(count)}
    contenders = [*_torch(settings.directory, state)]
    if count <= settings.size.dcp_up_to:
        contenders += _dcp(settings.directory, state)
    contenders += _keepstep(settings.directory, state)
    rounds = min(_MOST_ROUNDS, settings.size.rounds, max(1, _ROUNDS_TIMES_TENSORS // count))
    return interleaved(contenders, rounds, what=f"{count:,} small tensors")


_State = dict[str, dict[str, torch.Tensor]]


def _pair(name: str, path: Path, save: Callable[[], object], load: Callable[[], object]) -> list[Contender]:
    """Save and load as neighbours; whichever comes first in a round, the load finds a warm checkpoint."""

    def saved_and_cached() -> None:
        if not path.exists():
            save()
        for file in path.rglob("*") if path.is_dir() else [path]:
            if file.is_file():
                file.read_bytes()

    return [
        Contender(name=f"{name} save", run=lambda _: save(), before=lambda: remove(path)),
        Contender(
            name=f"{name} load", run=lambda _: load(), before=saved_and_cached, after=lambda: remove(path)
        ),
    ]


def _keepstep(directory: Path, state: _State) -> list[Contender]:
    path = directory / "store"
    store = Store(path)

    def save() -> None:
        state["tensors"]["blocks.0.part_0.weight"] += 1  # what did not change would be linked
        store.save(state)

    return _pair(
        "keepstep",
        path,
        save,
        lambda: Checkpoint.open(path / "checkpoint_0").load_into(state),
    )


def _torch(directory: Path, state: _State) -> list[Contender]:
    path = directory / "state.pt"

    def save() -> None:
        torch.save(state, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def load() -> None:
        saved = torch.load(path, weights_only=True)
        for name, tensor in state["tensors"].items():
            tensor.copy_(saved["tensors"][name])

    return _pair("torch", path, save, load)


def _dcp(directory: Path, state: _State) -> list[Contender]:
    path = directory / "dcp"

    def save() -> None:
        dcp_save(dict(state), checkpoint_id=path, no_dist=True)
        fsync_all(path)

    return _pair("dcp", path, save, lambda: dcp_load(dict(state), checkpoint_id=path, no_dist=True))
