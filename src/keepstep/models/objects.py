"""Any tree of tensors and plain values as one file, without pickle: `save_object` and `load`.

The file is a safetensors file. Of a state dict it holds the tensors under their names, so every tool that
reads safetensors loads it. Of anything else it holds the tensors, and in its metadata the tree around them as
typed JSON (see `keepstep.tree`).
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, UsageError
from keepstep.files import Files, LocalFiles
from keepstep.models.naming import Device
from keepstep.models.shards import FORMAT_KEY, apart_from_aliases, dense
from keepstep.models.weights import open_safetensors
from keepstep.models.writing import write_weights, writing_in
from keepstep.tree import flatten, unflatten

__all__ = ["load", "save_object"]

_TREE_KEY = "keepstep.tree"


def save_object(
    obj: Any,
    f: str | os.PathLike[str] | io.IOBase,
    safe_serialization: bool = False,
    *,
    files: Files | None = None,
) -> None:
    """Write a tree of tensors and plain values to one file, atomically and durably; `keepstep.load` reads it.

    Args:
        obj: a state dict, or anything that a checkpoint may hold: dicts, lists, tensors, arrays, plain
            values, objects with `state_dict`.
        f: a path, or a file opened for writing bytes.
        safe_serialization: True insists on a state dict of tensors alone.
        files: how the disk is changed.

    Raises:
        UnsupportedTypeError: a leaf of a type that is not stored, with its place.
        UsageError: `safe_serialization` with something else than a state dict.
        StoreError: the disk refuses; what was there is whole.
    """
    tensors, metadata = _as_file(obj, insist=safe_serialization)
    if not isinstance(f, str | os.PathLike):
        f.write(save(dense(tensors), metadata))
        return
    path, disk = Path(f), files or LocalFiles()
    with writing_in(path.parent, disk, "saving", path):
        write_weights(path, tensors, metadata, disk)  # <- commit
        disk.sync_directory(path.parent)


def _as_file(obj: Any, *, insist: bool) -> tuple[Mapping[str, torch.Tensor], dict[str, str]]:
    if _is_state_dict(obj):
        kept, aliases = apart_from_aliases(obj)
        return kept, {FORMAT_KEY: "pt", **aliases}
    if insist:
        raise UsageError(
            f"safe_serialization=True writes a state dict of tensors, and got a {type(obj).__name__}. Leave "
            "the argument out: other values are written without pickle too"
        )
    flat = flatten(obj)
    tensors, aliases = apart_from_aliases({leaf.address: leaf.tensor for leaf in flat.leaves})
    tree = json.dumps(flat.tree, separators=(",", ":"))
    return tensors, {FORMAT_KEY: "pt", _TREE_KEY: tree, **aliases}


def _is_state_dict(obj: Any) -> bool:
    return (
        isinstance(obj, Mapping)
        and bool(obj)
        and all(isinstance(name, str) for name in obj)
        and all(type(value) in (torch.Tensor, torch.nn.Parameter) for value in obj.values())
    )


def load(f: str | os.PathLike[str], map_location: Device | None = None, *, weights_only: bool = True) -> Any:
    """Read a file that `Accelerator.save` wrote, or any safetensors file. Nothing in it is executed.

    Args:
        f: its path.
        map_location: where tensors go; None for the CPU, as a private mapping of the file.
        weights_only: only True, as there is nothing else in such a file.

    Raises:
        CheckpointNotFoundError: there is no such file.
        DamagedCheckpointError: it is cut off, or no file of this kind (a pickle for instance).
        UnsupportedTypeError: a value's codec is not registered.
    """
    if not weights_only:
        raise UsageError("weights_only=False would unpickle; files of keepstep's hold no pickle to read")
    path = Path(f)
    if not path.is_file():
        raise CheckpointNotFoundError(f"there is no file {path}")
    try:
        tensors, metadata = open_safetensors(path)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            path,
            "it can't be read: keepstep.load reads safetensors files, as Accelerator.save writes them. If "
            f"this is a pickle of torch.save, torch.load(..., weights_only=True) reads it ({error.message})",
        ) from error
    if map_location is not None:
        tensors = {name: tensor.to(torch.device(map_location)) for name, tensor in tensors.items()}
    if _TREE_KEY not in metadata:
        return tensors
    try:
        return unflatten(json.loads(metadata[_TREE_KEY]), tensors.__getitem__)
    except (ValueError, LookupError) as error:
        raise DamagedCheckpointError(path, f"its tree can't be read ({error})") from error
