"""Weights as safetensors files in a directory that others load: one file, or shards with an index.

Readers take `model.safetensors` if it is there, else the shards that `model.safetensors.index.json` names. So
the export is switched by one operation, and whoever is killed leaves the old one or the new one:

* one file: written aside, then renamed over the old one;
* shards: written under names that the present index does not use, then the index is renamed over the old one
  (and an old `model.safetensors`, which readers would prefer, is removed).

What the old export alone used goes afterwards. Files of other names are not touched.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, STATE_NAME
from keepstep.errors import DirectoryNotOursError, UsageError
from keepstep.files import Files, LocalFiles
from keepstep.models.names import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from keepstep.models.shards import FORMAT_KEY, apart_from_aliases, shard_names, split
from keepstep.models.sizes import convert_file_size_to_int
from keepstep.models.writing import unfinished_name, write_weights, writing_in

__all__ = ["check_export", "export_weights"]

_SHARD = re.compile(r"model(?:-next)?-\d{5}-of-\d{5}\.safetensors\Z")
_TORCH_NAMES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)

_log = logging.getLogger(__name__)


def export_weights(
    tensors: Mapping[str, torch.Tensor],
    save_directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    files: Files | None = None,
) -> None:
    """Write a model's state dict as safetensors files; durable on return.

    Tied weights are written once; the other names are in the file's metadata, as safetensors' own
    `save_model` keeps them.

    Args:
        tensors: names and values; they may be on any device.
        save_directory: made if it is not there. What an earlier export left in it is replaced.
        max_shard_size: bytes, or a text as "1GB"; a larger tensor gets a file of its own.
        safe_serialization: only True: the other format is pickle.
        files: how the disk is changed.

    Raises:
        UsageError: the size is none, or pickle was asked for.
        DirectoryNotOursError: the directory is a file, or a checkpoint.
        TensorNotSavableError: a value is no tensor, or has no plain bytes.
        StoreError: the disk refuses; what was there is whole.
    """
    check_export(save_directory, max_shard_size, safe_serialization)
    limit = convert_file_size_to_int(max_shard_size)
    directory = Path(save_directory)
    kept, aliases = apart_from_aliases(tensors)
    parts = split([(name, tensor.numel() * tensor.itemsize) for name, tensor in kept.items()], limit)
    _Export(files or LocalFiles(), directory).run(kept, aliases, parts)


def check_export(
    save_directory: str | os.PathLike[str], max_shard_size: int | str, safe_serialization: bool
) -> None:
    """See whether an export may be written to a directory; changes nothing.

    Raises:
        UsageError, DirectoryNotOursError: see `export_weights`.
    """
    if not safe_serialization:
        raise UsageError(
            "safe_serialization=False asks for a pickle (pytorch_model.bin), and keepstep never writes one: "
            "whoever loads it runs what is in it. Leave the argument out: safetensors files are read by "
            "transformers, Accelerate and torch alike"
        )
    convert_file_size_to_int(max_shard_size)
    directory = Path(save_directory)
    if directory.exists() and not directory.is_dir():
        raise DirectoryNotOursError(errno.EEXIST, f"{directory} is a file; weights are saved to a directory")
    if (directory / MANIFEST_NAME).exists() and (directory / STATE_NAME).exists():
        raise DirectoryNotOursError(
            errno.EEXIST,
            f"{directory} is a checkpoint, which weights of another moment would damage. Choose another "
            "directory",
        )


class _Export:
    def __init__(self, files: Files, directory: Path) -> None:
        self._files = files
        self._directory = directory

    def run(
        self, kept: Mapping[str, torch.Tensor], aliases: Mapping[str, str], parts: Sequence[Sequence[str]]
    ) -> None:
        with writing_in(self._directory, self._files, "exporting weights to"):
            if len(parts) == 1:
                self._single(kept, aliases)
            else:
                self._sharded(kept, aliases, parts)
        left = [name for name in _TORCH_NAMES if (self._directory / name).exists()]
        if left:
            _log.warning(
                "%s also holds %s, which some readers prefer to what was saved now", self._directory, left[0]
            )

    def _single(self, kept: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
        self._write(SAFE_WEIGHTS_NAME, kept, aliases)  # <- commit: readers take this file before any index
        self._files.sync_directory(self._directory)
        self._remove([SAFE_WEIGHTS_INDEX_NAME])
        self._remove_shards(but=())

    def _sharded(
        self, kept: Mapping[str, torch.Tensor], aliases: Mapping[str, str], parts: Sequence[Sequence[str]]
    ) -> None:
        final = shard_names("model", len(parts))
        taken = self._named_by_index()
        names = shard_names("model-next", len(parts)) if taken & set(final) else final
        for name, part in zip(names, parts, strict=True):
            shard = {key: kept[key] for key in part}
            self._write(name, shard, {alias: base for alias, base in aliases.items() if base in shard})
        self._files.sync_directory(self._directory)
        total = sum(tensor.numel() * tensor.itemsize for tensor in kept.values())
        self._write_index(names, parts, total)  # <- commit, unless there is an old single file
        self._remove([SAFE_WEIGHTS_NAME])  # <- commit then
        self._remove_shards(but=names)
        if names != final:
            self._rename_shards(names, final)
            self._write_index(final, parts, total)
            self._remove_shards(but=final)

    def _rename_shards(self, names: Sequence[str], final: Sequence[str]) -> None:
        """The same files under the names that everybody expects, beside those that the index uses."""
        for name, other in zip(names, final, strict=True):
            self._files.link(self._directory / name, self._directory / other)
        self._files.sync_directory(self._directory)

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str]) -> None:
        write_weights(self._directory / name, tensors, {FORMAT_KEY: "pt", **aliases}, self._files)

    def _write_index(self, names: Sequence[str], parts: Sequence[Sequence[str]], total_bytes: int) -> None:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        body = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        unfinished = self._directory / unfinished_name()
        self._files.write_file(unfinished, json.dumps(body, indent=2).encode() + b"\n")
        self._files.rename(unfinished, self._directory / SAFE_WEIGHTS_INDEX_NAME)
        self._files.sync_directory(self._directory)

    def _names(self) -> list[str]:
        return sorted(entry.name for entry in self._directory.iterdir())

    def _named_by_index(self) -> set[str]:
        try:
            index: Any = json.loads((self._directory / SAFE_WEIGHTS_INDEX_NAME).read_bytes())
            return set(index["weight_map"].values())
        except FileNotFoundError:
            return set()
        except (ValueError, TypeError, LookupError, AttributeError):
            return set(self._names())  # unreadable: whatever is there may be in use

    def _remove(self, names: Any) -> None:
        """Remove files, those that are there, and make that durable."""
        there = [name for name in names if os.path.lexists(self._directory / name)]
        for name in there:
            self._files.remove_file(self._directory / name)
        if there:
            self._files.sync_directory(self._directory)

    def _remove_shards(self, *, but: Sequence[str]) -> None:
        """Remove files that are named as shards are, and that the export doesn't use any more."""
        self._remove(name for name in self._names() if _SHARD.match(name) and name not in but)
