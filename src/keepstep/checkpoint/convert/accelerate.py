"""Directories that Hugging Face Accelerate's `save_state` wrote.

    model.safetensors, model_1.safetensors ...      weights (or pytorch_model.bin ...)
    optimizer.bin, optimizer_1.bin ...              optimizer states
    scheduler.bin, scheduler_1.bin ...              scheduler states
    scaler.pt                                       loss scale (fp16)
    random_states_N.pkl                             generators of rank N
    custom_checkpoint_0.pkl ...                     registered objects
    sampler.bin, dl_state_dict.bin ...              what Accelerate keeps of loaders

All but safetensors are pickles, of which tensors, arrays and plain values are read and nothing is executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from keepstep.checkpoint.convert.torch_files import read_torch_file
from keepstep.checkpoint.format.manifest import MANIFEST_NAME
from keepstep.errors import DamagedCheckpointError, UsageError

__all__ = [
    "AccelerateState",
    "is_accelerate_state",
    "newest_accelerate_state",
    "read_accelerate_state",
]

_SHARDED = re.compile(r"(pytorch_model_fsdp|optimizer)_\d+|zero_.*|global_step\d+")


@dataclass(frozen=True, kw_only=True)
class AccelerateState:
    """What one rank finds in such a directory.

    Attributes:
        path: the directory.
        models, optimizers, schedulers: their state dicts, in order.
        registered: states of registered objects, in order.
        scaler: state of the loss scale; None if there was none.
        generators: of this rank, in torch's and NumPy's own forms; None if there are none for it.
        loaders: names of files about loaders.
    """

    path: Path
    models: list[dict[str, torch.Tensor]]
    optimizers: list[dict[str, Any]]
    schedulers: list[dict[str, Any]]
    registered: list[Any]
    scaler: dict[str, Any] | None
    generators: dict[str, Any] | None
    loaders: list[str]


def is_accelerate_state(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory looks like one that Accelerate's `save_state` wrote."""
    path = Path(directory)
    if not path.is_dir() or (path / MANIFEST_NAME).exists():
        return False
    return any(path.glob("random_states_*.pkl")) or (path / "optimizer.bin").is_file()


def newest_accelerate_state(checkpoints: Path | str | None) -> Path | None:
    """The last of the directories that Accelerate numbered (`checkpoint_N`); None if there is none.

    Args:
        checkpoints: where they are; an address of a bucket has none.
    """
    if not isinstance(checkpoints, Path) or not checkpoints.is_dir():
        return None
    named = {entry: re.fullmatch(r"checkpoint_(\d+)", entry.name) for entry in checkpoints.iterdir()}
    found = [(int(match[1]), entry) for entry, match in named.items() if match and is_accelerate_state(entry)]
    return max(found)[1] if found else None


def read_accelerate_state(directory: str | os.PathLike[str], rank: int = 0) -> AccelerateState:
    """Read such a directory; tensors are mapped from the files where they allow that.

    Args:
        directory: what `save_state` was given.
        rank: whose generators are read.

    Raises:
        UsageError: it was written by FSDP or DeepSpeed in shards.
        ForeignTypeError: a file holds objects of classes that would have to be run to be read.
        DamagedCheckpointError: a file is cut off.
    """
    path = Path(directory)
    shards = [entry.name for entry in path.iterdir() if entry.is_dir() and _SHARDED.fullmatch(entry.name)]
    if shards:
        raise UsageError(
            f"{path} holds weights in shards ({shards[0]}), as FSDP and DeepSpeed write them through "
            "Accelerate. Merge them first (accelerate merge-weights); load_checkpoint_in_model reads that"
        )
    scaler, generators = path / "scaler.pt", path / f"random_states_{rank}.pkl"
    return AccelerateState(
        path=path,
        models=[_weights(file) for file in _weight_files(path)],
        optimizers=[read_torch_file(file, arrays=True) for file in _numbered(path, "optimizer", ".bin")],
        schedulers=[read_torch_file(file, arrays=True) for file in _numbered(path, "scheduler", ".bin")],
        registered=[read_torch_file(file, arrays=True) for file in _registered(path)],
        scaler=read_torch_file(scaler, arrays=True) if scaler.is_file() else None,
        generators=read_torch_file(generators, arrays=True) if generators.is_file() else None,
        loaders=sorted(
            entry.name for entry in path.iterdir() if entry.name.startswith(("sampler", "dl_state_dict"))
        ),
    )


def _numbered(path: Path, stem: str, suffix: str) -> Iterator[Path]:
    """The files of the first, second ... of a kind."""
    number = 0
    while (file := path / f"{stem}{f'_{number}' if number else ''}{suffix}").is_file():
        yield file
        number += 1


def _weight_files(path: Path) -> list[Path]:
    return list(_numbered(path, "model", ".safetensors")) or list(_numbered(path, "pytorch_model", ".bin"))


def _registered(path: Path) -> Iterator[Path]:
    number = 0
    while (file := path / f"custom_checkpoint_{number}.pkl").is_file():
        yield file
        number += 1


def _weights(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        state: dict[str, torch.Tensor] = read_torch_file(file)
        return state
    try:
        return load_file(file)
    except SafetensorError as error:
        raise DamagedCheckpointError(file, f"it is no whole safetensors file ({error})") from error
