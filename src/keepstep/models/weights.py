"""Weights from files: a safetensors or torch file, an index with its shards, a directory, a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from keepstep.checkpoint.convert.torch_files import read_torch_file
from keepstep.checkpoint.format.manifest import MANIFEST_NAME, STATE_NAME
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, MissingFileError, UsageError
from keepstep.models.names import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from keepstep.models.naming import Device, placed_on

__all__ = ["load_state_dict", "open_safetensors", "read_weights"]

_IN_ORDER = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def read_weights(checkpoint: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, on the CPU, mapped from the files where that is possible.

    Args:
        checkpoint: a `.safetensors` file, a file of `torch.save`, an `.index.json`, a directory with
            `model.safetensors` or `pytorch_model.bin` or one index, or a checkpoint of keepstep's, of which
            the first model is taken (verified).

    Raises:
        CheckpointNotFoundError: there is nothing of the kind.
        DamagedCheckpointError: in one of its kinds.
        ForeignTypeError: a torch file holds more than tensors and plain values.
    """
    path = Path(checkpoint)
    if path.is_dir():
        if (path / MANIFEST_NAME).exists() and (path / STATE_NAME).exists():
            return _model_of(path)
        path = _in_directory(path)
    if not path.is_file():
        raise CheckpointNotFoundError(
            f"there is no checkpoint at {path}: expected a weights file, an index file or a directory of them"
        )
    return _of_index(path) if path.name.endswith(".json") else _of_file(path)


def load_state_dict(
    checkpoint_file: str | os.PathLike[str], device_map: Mapping[str, Device] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, each on its device; see `read_weights` for what is read.

    Args:
        checkpoint_file: a file of weights, an index or a directory.
        device_map: devices by the names of modules or tensors; "disk", and what it doesn't name, stays on
            the CPU, mapped. None for all on the CPU.

    Raises:
        CheckpointNotFoundError, DamagedCheckpointError, ForeignTypeError: as for `read_weights`.
    """
    weights = read_weights(checkpoint_file)
    if device_map is None:
        return weights
    for name, tensor in weights.items():
        device = placed_on(device_map, name)
        if device is not None and device not in ("cpu", "disk"):
            weights[name] = tensor.to(torch.device(device))
    return weights


def _model_of(path: Path) -> dict[str, torch.Tensor]:
    state = Checkpoint.open(path).load("model")["model"]
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _in_directory(directory: Path) -> Path:
    for name in _IN_ORDER:
        if (directory / name).is_file():
            return directory / name
    indexes = sorted(directory.glob("*.index.json"))
    if len(indexes) == 1:
        return indexes[0]
    if indexes:
        names = ", ".join(index.name for index in indexes)
        raise UsageError(f"{directory} holds several indexes ({names}); give the path of the one to load")
    raise CheckpointNotFoundError(
        f"{directory} holds no weights: expected {', '.join(_IN_ORDER)} or a checkpoint's manifest.json"
    )


def _of_index(path: Path) -> dict[str, torch.Tensor]:
    try:
        index: Any = json.loads(path.read_bytes())
        weight_map: dict[str, str] = dict(index.get("weight_map", index))
    except (ValueError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(path, f"it is no index of shards ({error})") from error
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted(set(weight_map.values())):
        if not isinstance(name, str) or name != Path(name).name:
            raise DamagedCheckpointError(path, f"it names {name!r}, which is no file beside it")
        if not (path.parent / name).is_file():
            raise MissingFileError(path.parent, f"{path.name} names {name}, which is not there")
        tensors.update(_of_file(path.parent / name))
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise DamagedCheckpointError(path, f"{weight_map[absent[0]]} lacks {absent[0]!r}, which it names")
    return tensors


def _of_file(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors" or _is_safetensors(path):
        return open_safetensors(path)[0]
    state = read_torch_file(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UsageError(f"{path} holds a {type(state).__name__}, not a state dict of tensors by name")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _is_safetensors(path: Path) -> bool:
    """Whether a file of any name begins like a safetensors file: a length, then JSON."""
    with path.open("rb") as file:
        length, first = int.from_bytes(file.read(8), "little"), file.read(1)
    return first == b"{" and 0 < length <= path.stat().st_size


def open_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, tied names included, and its metadata.

    Raises:
        DamagedCheckpointError: it is cut off, or no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise DamagedCheckpointError(path, f"it is no whole safetensors file ({error})") from error
    for alias, base in metadata.items():
        if alias not in tensors and base in tensors:
            tensors[alias] = tensors[base]
    return tensors, metadata
