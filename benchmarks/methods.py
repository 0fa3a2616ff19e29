"""keepstep and its peers, each saving and loading the same training state at its best."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import accelerate
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.workload import TrainingState
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint

__all__ = [
    "DCP",
    "Method",
    "dcp_state_dict",
    "fsync_all",
    "methods",
    "quiet_peers",
    "remove",
]

DCP = "dcp (2 threads)"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to save a training state into a directory, and to load it back into the live objects.

    Attributes:
        name: in the tables.
        save: into a directory that does not exist.
        load: everything, into the live objects.
        durable: whether `save` returns with everything on disk; otherwise it is fsynced on the clock.
        load_only: it saves as another method does.
    """

    name: str
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    durable: bool = False
    load_only: bool = False


def quiet_peers() -> None:
    """Their warnings about a missing process group and the like say nothing about speed."""
    warnings.filterwarnings("ignore", module=r"(torch|accelerate)\b")
    for name in ("torch", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


def methods(state: TrainingState) -> list[Method]:
    """All methods, keepstep last."""
    return [
        _torch(state, mmap=False),
        _torch(state, mmap=True),
        _accelerate(state),
        _dcp(state, 1, "dcp"),
        _dcp(state, 2, DCP),
        _keepstep(state),
    ]


def _keepstep(state: TrainingState) -> Method:
    stores: dict[Path, Store] = {}

    def save(directory: Path) -> None:
        store = stores.setdefault(directory, Store(directory))  # as in a training run: one store, many saves
        store.save(state.objects, step=1)

    def load(directory: Path) -> None:
        Checkpoint.open(directory / "checkpoint_0").load_into(state.objects)

    return Method(name="keepstep", save=save, load=load, durable=True)


def _torch(state: TrainingState, *, mmap: bool) -> Method:
    def save(directory: Path) -> None:
        directory.mkdir()
        torch.save(state.state_dicts(), directory / "state.pt")

    def load(directory: Path) -> None:
        saved = torch.load(directory / "state.pt", weights_only=True, mmap=mmap)
        state.model.load_state_dict(saved["model"])
        state.optimizer.load_state_dict(saved["optimizer"])

    return Method(name="torch (mmap)" if mmap else "torch", save=save, load=load, load_only=mmap)


def _accelerate(state: TrainingState) -> Method:
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(state.model, state.optimizer)

    def save(directory: Path) -> None:
        accelerator.save_state(str(directory))

    def load(directory: Path) -> None:
        accelerator.load_state(str(directory))

    return Method(name="accelerate", save=save, load=load)


def _dcp(state: TrainingState, threads: int, name: str) -> Method:
    def save(directory: Path) -> None:
        writer = FileSystemWriter(directory, thread_count=threads)
        dcp_save(dcp_state_dict(state), storage_writer=writer, no_dist=True)

    def load(directory: Path) -> None:
        # In place into the live tensors. What its users call afterwards, set_state_dict, is left out here.
        dcp_load(dcp_state_dict(state), checkpoint_id=directory, no_dist=True)

    return Method(name=name, save=save, load=load)


def dcp_state_dict(state: TrainingState) -> dict[str, object]:
    """What DCP's documentation says to save: flat names instead of the optimizer's numbers."""
    model, optimizer = get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer}


def fsync_all(path: Path) -> None:
    """Make every file and name below `path` durable: no more than a peer's user has to do.

    Kinder to peers than sync(1), which would also wait for what other processes wrote.
    """
    for parent, _, names in os.walk(path):
        for name in names:
            _fsync(Path(parent, name))
        _fsync(Path(parent))
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
