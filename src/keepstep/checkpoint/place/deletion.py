"""What of a directory is a checkpoint's, and its deletion. No torch.

A file that the manifest does not name is somebody else's and stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from keepstep.checkpoint.format.manifest import MANIFEST_NAME
from keepstep.checkpoint.format.names import directories_within
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import has_plain_parents
from keepstep.errors import CheckpointBusyError, DamagedCheckpointError, StoreError
from keepstep.files import Files
from keepstep.locks import DirectoryLock

__all__ = ["delete_checkpoint", "empty_trash", "foreign_names", "is_ours", "reading"]

log = logging.getLogger(__name__)


def is_ours(directory: Path) -> bool:
    """Whether a directory holds a checkpoint of keepstep's, with a manifest that can be read."""
    return bool(_ours_in(directory))


def foreign_names(directory: Path) -> list[str]:
    """What lies in a checkpoint's directory, and in those within it, and is not the checkpoint's."""
    manifest = read_manifest(directory)
    known: set[str] = set()
    inner = [
        name
        for name in directories_within(manifest.files, manifest.directories)
        if has_plain_parents(directory, f"{name}/", known) and name in known
    ]
    ours = {MANIFEST_NAME, *manifest.files, *inner}
    found = {
        f"{prefix}{entry}"
        for prefix in ("", *(f"{name}/" for name in inner))
        for entry in os.listdir(directory / prefix)
    }
    return sorted(found - ours)


class _Ours(NamedTuple):
    """What of a directory is the checkpoint's: its files, the manifest last, and its directories."""

    files: Collection[str] = ()
    directories: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.files)


def _ours_in(directory: Path) -> _Ours | None:
    """What the manifest names; None if it can't be read. Without one, nothing is ours."""
    try:
        manifest = read_manifest(directory)
    except DamagedCheckpointError:
        return None if (directory / MANIFEST_NAME).exists() else _Ours()
    names = directories_within(manifest.files, manifest.directories)
    return _Ours([*manifest.files, MANIFEST_NAME], names)


def delete_checkpoint(files: Files, directory: Path, trash: Path) -> None:
    """Delete a checkpoint: out of sight by one rename first, then its files.

    Files that keepstep did not write are not deleted: they stay, in a directory of the old name. If a link
    stands for the checkpoint, the link goes and what it points to stays: it lies outside the store.

    Raises:
        CheckpointBusyError: it is being read.
        StoreError: its manifest is damaged, so there is no telling which files are keepstep's.
    """
    if directory.is_symlink():
        log.warning("%s is a link; what it points to, %s, is kept", directory, directory.resolve())
        files.remove_file(directory)
        return
    ours = _ours_in(directory)
    if ours is None:
        raise StoreError(
            f"{directory} was not deleted: its manifest can't be read, so there is no telling which of its "
            "files keepstep wrote. Look at what is left, and remove the directory by hand"
        )
    files.make_directory(trash)
    doomed = trash / f"{directory.name}.{secrets.token_hex(4)}"
    with _unread(directory):
        files.rename(directory, doomed)
    files.sync_directory(directory.parent)
    _remove(files, doomed, ours)
    if doomed.exists():
        log.warning("%s held files that keepstep did not write; they were kept", directory)
        if not directory.exists():
            files.rename(doomed, directory)


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Hold off the deletion of a checkpoint while it is read; without effect where there are no locks.

    Who finds the mark taken is late: the checkpoint is being deleted, and the read will say that it is gone.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            held.callback(DirectoryLock(directory, shared=True).release)
        yield


@contextlib.contextmanager
def _unread(directory: Path) -> Iterator[None]:
    """Hold off readers while a checkpoint is taken out of sight."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # without locks nobody can be held off
            try:
                held.callback(DirectoryLock(directory).release)
            except BlockingIOError:
                raise CheckpointBusyError(
                    f"{directory} is being read by another process or thread and was not deleted. Delete it "
                    "when they are done"
                ) from None
        yield


def _remove(files: Files, directory: Path, ours: _Ours) -> None:
    """Remove what is ours, the manifest last, since it says what there is; then the directory if it is empty.

    What lies behind a link lies elsewhere, and stays.
    """
    known: set[str] = set()
    for name in ours.files:
        if name == MANIFEST_NAME:
            _remove_directories(files, directory, ours.directories)
        if has_plain_parents(directory, name, known):
            with contextlib.suppress(FileNotFoundError):
                files.remove_file(directory / name)
    _remove_if_empty(files, directory)


def _remove_directories(files: Files, directory: Path, names: Sequence[str]) -> None:
    """Remove those that are empty, the inner ones first."""
    known: set[str] = set()
    for name in reversed(names):
        if has_plain_parents(directory, f"{name}/", known):
            _remove_if_empty(files, directory / name)


def _remove_if_empty(files: Files, directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another thread empties the trash as well
        if not os.listdir(directory):
            files.remove_directory(directory)


def empty_trash(files: Files, trash: Path) -> None:
    """Finish deletions that a dead process began; what refuses to go stays in the trash."""
    for entry in os.listdir(trash) if trash.is_dir() else []:
        path = trash / entry
        if path.is_symlink() or not path.is_dir():
            continue
        try:
            _remove(files, path, _ours_in(path) or _Ours())  # the manifest went with an earlier attempt
        except OSError as error:
            log.warning("could not remove %s (%s); the next process that writes tries again", path, error)
