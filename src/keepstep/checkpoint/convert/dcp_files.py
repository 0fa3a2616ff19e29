"""Directories of torch.distributed.checkpoint: the shards that FSDP ranks wrote, as whole tensors.

The `.metadata` of such a directory is a pickle. Only DCP's own descriptions are let through here; tensors are
read by torch's restricted unpickler, and values that are no tensors are not read at all.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, ForeignTypeError

__all__ = ["is_dcp", "read_dcp_model"]

_METADATA: Final = ".metadata"
_OF_DCP: Final = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_DESCRIPTIONS: Final = {
    *((_OF_DCP[0], name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata")),
    *((_OF_DCP[0], name) for name in ("MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_OF_DCP[0], name) for name in ("TensorStorageMetadata", "_MEM_FORMAT_ENCODING")),
    *((_OF_DCP[1], name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")),
    *(("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("pathlib", "Path")),
}


def is_dcp(directory: Path) -> bool:
    """Whether a directory was written by torch.distributed.checkpoint's own storage."""
    return (directory / _METADATA).is_file()


def read_dcp_model(directory: Path) -> dict[str, torch.Tensor]:
    """The model's tensors, whole and on the CPU, by their names in its state dict.

    Args:
        directory: what `torch.distributed.checkpoint.save` wrote: `{"model": state_dict, ...}`, as Accelerate
            does too, or a model's state dict by itself.

    Raises:
        CheckpointNotFoundError: it is no such directory, or holds no tensors.
        ForeignTypeError: its metadata names classes that are no descriptions.
        DamagedCheckpointError: a file is missing or cut off.
    """
    if not is_dcp(directory):
        raise CheckpointNotFoundError(f"{directory} holds no {_METADATA} of DCP")
    reader = _Reader(directory)
    metadata = reader.read_metadata()
    paths: dict[str, tuple[Any, ...]] = metadata.planner_data or {}
    state: dict[str, Any] = {}
    names: dict[str, str] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            state[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            names[key] = ".".join(map(str, paths.get(key, (key,))))
    of_model = {key for key in state if paths.get(key, (key,))[0] == "model"}
    if of_model:
        state = {key: state[key] for key in of_model}
        names = {key: names[key].removeprefix("model.") for key in of_model}
    if not state:
        raise CheckpointNotFoundError(f"{directory} holds no tensors")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it is meant to be
            load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        reason = _first_line(error)
        raise DamagedCheckpointError(directory, f"shards cannot be read ({reason})") from error
    return {names[key]: state[key] for key in sorted(state, key=lambda key: names[key])}


class _Descriptions(pickle.Unpickler):
    """Makes DCP's descriptions and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DESCRIPTIONS or (module == "torch" and isinstance(_dtype(name), torch.dtype)):
            return super().find_class(module, name)
        raise ForeignTypeError(
            f"the {_METADATA} of a DCP checkpoint names {module}.{name}, and reading it would run code from "
            "the file. Expected are descriptions of tensors only"
        )


def _dtype(name: str) -> object:
    return getattr(torch, name, None)


class _Reader(FileSystemReader):
    """Torch's reader, with metadata that run nothing."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        path = Path(self.path) / _METADATA
        try:
            with path.open("rb") as file:
                metadata: Metadata = _Descriptions(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError) as error:
            raise DamagedCheckpointError(path, f"it is no metadata of DCP ({_first_line(error)})") from error
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0]
