"""Safetensors files that appear whole: written aside, made durable, then renamed.

What is not finished lies beside its place, under a name of ours, so whoever writes there next can remove what
a process that died has left.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from keepstep.disk_errors import disk_errors
from keepstep.files import Files
from keepstep.locks import DirectoryLock
from keepstep.models.shards import dense

__all__ = ["unfinished_name", "write_weights", "writing_in"]

_UNFINISHED = re.compile(r"\.keepstep-[0-9a-f]{12}\.tmp")
_CODE = re.compile(r"os error (\d+)")


def unfinished_name() -> str:
    """A new name for what is not finished."""
    return f".keepstep-{secrets.token_hex(6)}.tmp"


@contextlib.contextmanager
def writing_in(directory: Path, files: Files, doing: str, path: Path | None = None) -> Iterator[None]:
    """Hold a directory alone, without what writers that died have left there; it is made if need be.

    Args:
        directory: which.
        files: how the disk is changed.
        doing: what is under way, for messages, as "saving".
        path: what is written; None: the directory.

    Raises:
        NoSpaceError, StoreReadOnlyError, StoreError: the disk refuses.
    """
    left, room = "What was there before is whole", "choose another place"
    with disk_errors(path or directory, doing, left=left, room=room):
        files.make_directory(directory)
        lock = DirectoryLock(directory, wait=True)
        try:
            if lock.supported:
                _sweep(directory, files)
            yield
        finally:
            lock.release()


def _sweep(directory: Path, files: Files) -> None:
    for entry in sorted(directory.iterdir()):
        if _UNFINISHED.fullmatch(entry.name):
            if entry.is_dir() and not entry.is_symlink():
                files.remove_tree(entry)
            else:
                files.remove_file(entry)


def write_weights(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], files: Files
) -> None:
    """Put a file of tensors in the place of another one; the name is not durable yet.

    Call it inside `writing_in` of the same directory.

    Raises:
        OSError: the disk refuses; what was there is whole.
    """
    aside = path.with_name(unfinished_name())
    files.make_unfinished(aside)  # the library that writes makes a file of its own beside its target
    try:
        files.make_file(aside / path.name, lambda place: _save(place, tensors, metadata))
        files.rename(aside / path.name, path)
        files.remove_directory(aside)
    except OSError:
        with contextlib.suppress(OSError):
            files.remove_tree(aside)
        raise


def _save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    try:
        save_file(dense(tensors), path, dict(metadata))
    except SafetensorError as error:
        found = _CODE.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), str(error)) from error
