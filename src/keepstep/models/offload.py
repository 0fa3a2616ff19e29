"""Weights that wait on the disk, or in a dict on the host, until a module runs.

A folder of offloaded weights holds safetensors files and `index.json`, which says in which file each is. They
are mapped, not read: a page comes in when it is touched, and goes when memory is short.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch

from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError
from keepstep.files import Files, LocalFiles
from keepstep.models.naming import set_module_tensor_to_device
from keepstep.models.shards import FORMAT_KEY, apart_from_aliases
from keepstep.models.weights import open_safetensors
from keepstep.models.writing import unfinished_name, write_weights, writing_in

__all__ = [
    "OffloadFolder",
    "OffloadedWeightsLoader",
    "extract_submodules_state_dict",
    "load_offloaded_weights",
    "offload_state_dict",
    "offload_weight",
    "save_offload_index",
]

_INDEX = "index.json"
_OURS = re.compile(r"offloaded-[0-9a-f]{12}\.safetensors")


class OffloadFolder:
    """A folder of offloaded weights.

    Args:
        folder: made when something is added.
        files: how the disk is changed.
    """

    def __init__(self, folder: str | os.PathLike[str], files: Files | None = None) -> None:
        self.path = Path(folder)
        self._files: Files = files or LocalFiles()

    def index(self) -> dict[str, dict[str, Any]]:
        """What is where, by name; empty if there is no index.

        Raises:
            DamagedCheckpointError: the index can't be read.
        """
        try:
            index: dict[str, dict[str, Any]] = json.loads((self.path / _INDEX).read_bytes())
            return {str(name): dict(entry) for name, entry in index.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise DamagedCheckpointError(self.path / _INDEX, f"it is no index ({error})") from error

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write weights, beside those that are there; one of the same name is replaced."""
        if not tensors:
            return
        name = f"offloaded-{secrets.token_hex(6)}.safetensors"
        kept, aliases = apart_from_aliases(tensors)
        added = {
            key: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "safetensors_file": name,
                "weight_name": aliases.get(key, key),
            }
            for key, tensor in tensors.items()
        }
        with writing_in(self.path, self._files, "offloading weights to"):
            index = {**self.index(), **added}
            write_weights(self.path / name, kept, {FORMAT_KEY: "pt", **aliases}, self._files)
            unfinished = self.path / unfinished_name()
            self._files.write_file(unfinished, json.dumps(index, indent=2).encode())
            self._files.rename(unfinished, self.path / _INDEX)
            self._files.sync_directory(self.path)
            self._remove_unused(index)

    def _remove_unused(self, index: Mapping[str, Mapping[str, Any]]) -> None:
        """Files of ours that the index names no more, or that a writer which died has left."""
        used = {str(entry.get("safetensors_file", "")) for entry in index.values()}
        for entry in self.path.glob("offloaded-*.safetensors"):
            if _OURS.fullmatch(entry.name) and entry.name not in used:
                self._files.remove_file(entry)


def offload_state_dict(save_dir: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor]) -> None:
    """Write weights to a folder, from where `OffloadedWeightsLoader` and `dispatch_model` take them.

    Args:
        save_dir: made if it is not there; other weights in it stay.
        state_dict: names and values.
    """
    OffloadFolder(save_dir).add(state_dict)


def offload_weight(
    weight: torch.Tensor,
    weight_name: str,
    offload_folder: str | os.PathLike[str],
    index: MutableMapping[str, Any] | None = None,
) -> MutableMapping[str, Any]:
    """Write one weight to a folder; `offload_state_dict` writes many in one file, and much faster.

    Args:
        weight: its value.
        weight_name: its name.
        offload_folder: made if it is not there. Its own index is up to date on return.
        index: gets an entry for the weight; None for a new one.

    Returns:
        The index, to be handed to `load_offloaded_weights` or `OffloadedWeightsLoader`.
    """
    folder = OffloadFolder(offload_folder)
    folder.add({weight_name: weight})
    index = {} if index is None else index
    index[weight_name] = folder.index()[weight_name]
    return index


def save_offload_index(index: Mapping[str, Any], offload_folder: str | os.PathLike[str]) -> None:
    """See that a folder's index names these weights, as it does since `offload_weight` wrote them.

    Raises:
        CheckpointNotFoundError: it lacks one.
    """
    missing = sorted(index.keys() - OffloadFolder(offload_folder).index().keys())
    if missing:
        raise CheckpointNotFoundError(
            f"{offload_folder} does not hold {', '.join(missing[:5])} ({len(missing)} in all); write weights "
            "with offload_weight or offload_state_dict"
        )


def load_offloaded_weights(
    model: torch.nn.Module, index: Mapping[str, Any] | None, offload_folder: str | os.PathLike[str]
) -> None:
    """Put weights from a folder into a model, on the CPU.

    Args:
        model: has parameters or buffers of those names.
        index: names of the weights, as `offload_weight` returns it; None or empty for none.
        offload_folder: where they are.

    Raises:
        CheckpointNotFoundError: the folder lacks one of them.
    """
    if not index:
        return
    save_offload_index(index, offload_folder)
    weights = OffloadedWeightsLoader(save_folder=offload_folder)
    for name in index:
        set_module_tensor_to_device(model, name, "cpu", weights[name])


class OffloadedWeightsLoader(Mapping[str, torch.Tensor]):
    """Weights by name, from a dict on the host or mapped from a folder; the dict comes first.

    Args:
        state_dict: what is on the host.
        save_folder: of `offload_state_dict`.
        index: what is in the folder, or in safetensors files anywhere
            (`{name: {"safetensors_file": path, "weight_name": name}}`); None reads the folder's own.

    Raises:
        CheckpointNotFoundError: nothing was given, or the folder has no index.
    """

    def __init__(
        self,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_folder: str | os.PathLike[str] | None = None,
        index: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.state_dict = dict(state_dict or {})
        self._folder = None if save_folder is None else Path(save_folder)
        self.index = dict(index) if index is not None else {}
        if index is None and save_folder is not None:
            self.index = dict(OffloadFolder(save_folder).index())
        if not self.state_dict and not self.index:
            given = save_folder or "neither a state dict, nor a folder, nor an index was given"
            raise CheckpointNotFoundError(f"there are no offloaded weights: {given}")
        self._opened: dict[Path, dict[str, torch.Tensor]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.state_dict:
            return self.state_dict[name]
        entry = self.index[name]
        path = (self._folder or Path()) / str(entry["safetensors_file"])
        if path not in self._opened:
            self._opened[path] = open_safetensors(path)[0]
        tensor = self._opened[path][str(entry.get("weight_name", name))]
        dtype = entry.get("dtype")
        return tensor if dtype is None else tensor.to(getattr(torch, str(dtype)))

    def __iter__(self) -> Iterator[str]:
        yield from self.state_dict
        yield from (name for name in self.index if name not in self.state_dict)

    def __len__(self) -> int:
        return len(self.state_dict.keys() | self.index.keys())


def extract_submodules_state_dict(
    state_dict: Mapping[str, torch.Tensor], submodule_names: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The part of a state dict that lies in some modules (or is one of those names itself)."""
    wanted = tuple(submodule_names)
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if any(module == "" or name == module or name.startswith(f"{module}.") for module in wanted)
    }
