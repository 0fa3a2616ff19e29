"""Checkpoints of a frozen base with an adapter: what did not change is not written again."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.machine import warm
from benchmarks.methods import fsync_all, remove
from benchmarks.report import Bar, at_most, note, show_table, status
from benchmarks.settings import Frozen, Settings
from keepstep.checkpoint.keeping.catalog import disk_bytes
from keepstep.checkpoint.store import Store

__all__ = ["run"]

_MODEL = "keepstep, model"
_WITH_OPTIMIZER = "keepstep, model and optimizer"
_BYTES_LIMIT = 1.3
_TIME_LIMIT_PERCENT = 5


class _Adapted(nn.Module):
    """A base that no gradient reaches, and a low-rank adapter that is trained with AdamW."""

    def __init__(self, size: Frozen) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(size.width, size.width, bias=False) for _ in range(size.layers)]
        self.base = nn.Sequential(*layers).requires_grad_(False)
        self.down = nn.Linear(size.width, size.rank, bias=False)
        self.up = nn.Linear(size.rank, size.width, bias=False)

    @property
    def adapter_bytes(self) -> int:
        """What training changes."""
        return sum(p.nbytes for p in self.parameters() if p.requires_grad)

    @property
    def bytes(self) -> int:
        return sum(p.nbytes for p in self.parameters())


class _Training:
    """The model, its optimizer, and steps of the adapter."""

    def __init__(self, size: Frozen) -> None:
        self.model = _Adapted(size)
        adapter = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(adapter, lr=1e-3)
        self._sample = torch.rand(4, size.width)
        self.step()

    def step(self) -> None:
        self.model.up(self.model.down(self._sample)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def change_base(self) -> None:
        with torch.no_grad():
            for parameter in self.model.base.parameters():
                parameter.mul_(1.0001)

    def warm(self) -> None:
        warm(3 * self.model.bytes)


@dataclass(kw_only=True)
class _Measured:
    """Checkpoints of one way of saving.

    Attributes:
        kept: how many `bytes` holds.
        bytes: of all of them on disk.
        one_bytes: of a single one.
        first_s: the first save.
        later_s: each of the others.
        full_s: a full one afterwards, where later ones are not full.
    """

    kept: int
    bytes: int = 0
    one_bytes: int = 0
    first_s: float = 0.0
    later_s: list[float] = field(default_factory=list)
    full_s: float | None = None

    @property
    def later_median_s(self) -> float:
        return statistics.median(self.later_s)

    @property
    def reference_s(self) -> float:
        """The fastest full save there was: nothing is flattered by the cost of first times."""
        return self.first_s if self.full_s is None else min(self.first_s, self.full_s)


def run(settings: Settings) -> list[Bar]:
    """Print the table; return the bars."""
    size = settings.size.frozen
    training = _Training(size)
    everything = {"model": training.model, "optimizer": training.optimizer}
    found = {
        _MODEL: _keepstep(settings, training, {"model": training.model}),
        _WITH_OPTIMIZER: _keepstep(settings, training, everything),
    }
    for name, save in _peers(training):
        found[name] = _peer(settings, training, name, save)
    _show(found, training, size)
    model = found[_MODEL]
    alone_s = _adapter_alone_s(settings, training)
    note(f"A store that holds nothing but the adapter takes {alone_s:.3f} s to save it: that is the floor.")
    share = model.later_median_s / model.reference_s * 100
    return [
        at_most(
            f"frozen base, {size.checkpoints} checkpoints: bytes of one",
            model.bytes / model.one_bytes,
            _BYTES_LIMIT,
            "x",
        ),
        at_most(
            "frozen base: a later save's time, of a full one's", share, _TIME_LIMIT_PERCENT, " %", digits=1
        ),
    ]


def _seconds(training: _Training, work: Callable[[], object]) -> float:
    gc.collect()
    training.warm()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _keepstep(settings: Settings, training: _Training, state: dict[str, Any]) -> _Measured:
    size = settings.size.frozen
    root = settings.directory / "store"
    store = Store(root)
    measured = _Measured(kept=size.checkpoints)
    try:
        for number in range(size.checkpoints):
            training.step()
            with status(f"frozen: save {number + 1} of {size.checkpoints}"):
                took_s = _seconds(training, lambda: store.save(state))
            if number == 0:
                measured.first_s, measured.one_bytes = took_s, disk_bytes(root)
            else:
                measured.later_s.append(took_s)
        measured.bytes = disk_bytes(root)
        measured.full_s = min(_full_saves(settings, training, store, state))
    finally:
        remove(root)
    return measured


def _full_saves(
    settings: Settings, training: _Training, store: Store, state: dict[str, Any]
) -> Iterable[float]:
    """Full saves with everything warm: by the same store after the base changed, and by a new store."""
    training.change_base()
    yield _seconds(training, lambda: store.save(state))
    root = settings.directory / "another"
    try:
        yield _seconds(training, lambda: Store(root).save(state))
    finally:
        remove(root)


def _adapter_alone_s(settings: Settings, training: _Training) -> float:
    """A durable save of what training changed, without the base: as fast as a later save could be."""
    root = settings.directory / "adapter"
    store = Store(root)
    state = {"model": {"down": training.model.down.weight, "up": training.model.up.weight}}
    taken = []
    try:
        for _ in range(settings.size.frozen.checkpoints // 2):
            training.step()
            taken.append(_seconds(training, lambda: store.save(state)))
    finally:
        remove(root)
    return statistics.median(taken)


# ------------------------------------------------------------------------------------------ peers


def _peers(training: _Training) -> Sequence[tuple[str, Callable[[Path], object]]]:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(training.model, training.optimizer)

    def torch_save(path: Path) -> None:
        path.mkdir()
        state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
        torch.save(state, path / "state.pt")
        fsync_all(path)

    def save_state(path: Path) -> None:
        accelerator.save_state(str(path))
        fsync_all(path)

    def save_dcp(path: Path) -> None:
        model, optimizer = get_state_dict(training.model, training.optimizer)
        writer = FileSystemWriter(path, thread_count=2)
        dcp_save({"model": model, "optimizer": optimizer}, storage_writer=writer, no_dist=True)
        fsync_all(path)

    return (("torch.save", torch_save), ("accelerate", save_state), ("dcp (2 threads)", save_dcp))


def _peer(settings: Settings, training: _Training, name: str, save: Callable[[Path], object]) -> _Measured:
    """A few saves, each removed: a peer writes all of it each time."""
    path = settings.directory / "peer"
    measured = _Measured(kept=settings.size.frozen.checkpoints)
    for number in range(settings.size.frozen.peer_saves + 1):
        training.step()
        try:
            with status(f"frozen: {name}, save {number + 1}"):
                took_s = _seconds(training, lambda: save(path))
            measured.one_bytes = disk_bytes(path)
        finally:
            remove(path)
        if number == 0:
            measured.first_s = took_s
        else:
            measured.later_s.append(took_s)
    measured.bytes = measured.kept * measured.one_bytes
    return measured


# ------------------------------------------------------------------------------------------ table


def _show(found: dict[str, _Measured], training: _Training, size: Frozen) -> None:
    changes_bytes = {
        _MODEL: training.model.adapter_bytes,
        _WITH_OPTIMIZER: 3 * training.model.adapter_bytes,
    }
    rows = []
    for name, measured in found.items():
        least = 1 + (size.checkpoints - 1) * changes_bytes.get(name, 3 * training.model.adapter_bytes) / (
            measured.one_bytes
        )
        rows.append(
            (
                name,
                f"{measured.bytes / 1e6:,.0f}",
                f"{measured.bytes / measured.one_bytes:.2f}",
                f"{least:.2f}",
                f"{measured.first_s:.3f}",
                "" if measured.full_s is None else f"{measured.full_s:.3f}",
                f"{measured.later_median_s:.3f}",
                f"{measured.later_median_s / measured.reference_s:.1%}",
            )
        )
    base, adapter = training.model.bytes / 4e6, training.model.adapter_bytes / 4e6
    show_table(
        f"{size.checkpoints} durable checkpoints of {base:.0f}M parameters, {adapter:.1f}M of them trained",
        ("", "MB", "x one", "least x", "first s", "full s", "later s", "of full"),
        rows,
    )
    note(
        "'least x': one, and what training changed for each of the others. 'full s': a full save at the end,"
    )
    note("everything warm. A peer's bytes are those of one, times the number: it writes all of it each time.")
