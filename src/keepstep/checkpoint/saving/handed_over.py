"""A directory that the user hands over, committed as a checkpoint. No torch.

Its files lie below `files/`. One that is a whole checkpoint of keepstep's is taken over as it is: its files
keep their names, and what was said of it stays, with what is said now on top.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import xxhash

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, FileEntry, Manifest
from keepstep.checkpoint.format.names import HANDED_OVER, problem_of_name
from keepstep.checkpoint.format.parse import check_files, read_manifest
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.place.deletion import foreign_names, reading
from keepstep.checkpoint.saving.committing import commit
from keepstep.checkpoint.saving.copying import (
    Copier,
    SourceFile,
    check_unchanged,
    reading_source,
    stamp_of,
)
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DirectoryNotSavableError,
)

__all__ = ["Committed", "save_handed_over"]

_LINKED_FROM_BYTES: Final = 1 << 20
"""Smaller files are written each time, as segments are."""
_SAMPLE_BYTES: Final = 4096
_CHUNK_BYTES: Final = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """A committed checkpoint whose files a new one of the same store may be linked to.

    Attributes:
        place: where it lies.
        manifest: of it.
    """

    place: Place
    manifest: Manifest


def save_handed_over(
    workspace: Workspace,
    directory: Path,
    said: Description,
    lineage: Lineage,
    *,
    copier: Copier,
    previous: Committed | None = None,
) -> Manifest:
    """Commit a directory as a checkpoint; it is durable on return, and the directory may change again.

    Files that the checkpoint before has with the same content are linked to it. Links, sockets and devices
    are refused. Modes and times of files are not kept.

    Args:
        workspace: the unfinished checkpoint.
        directory: a whole checkpoint of keepstep's, or any other directory.
        said: of it.
        lineage: which run writes it, and after which checkpoint.
        copier: that copies.
        previous: the checkpoint before, in the same store.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        DirectoryNotSavableError: it can't be saved as it is, or changed meanwhile; nothing was committed.
        StoreError: the place refuses; nothing was committed.
    """
    check_directory(directory)
    with reading(directory):
        adopted = _whole_checkpoint(directory)
        with workspace.explained():
            try:
                workspace.check()
                workspace.open()
                if adopted is not None:
                    return _adopt(workspace, directory, adopted, said, lineage)
                return _copy(workspace, directory, said, lineage, copier, previous)
            except BaseException:
                workspace.discard()
                raise


def check_directory(directory: Path) -> None:
    """See that a directory is there.

    Raises:
        CheckpointNotFoundError: it is not, or it is something else.
    """
    if not directory.is_dir():
        what = "is no directory" if os.path.lexists(directory) else "does not exist"
        raise CheckpointNotFoundError(
            f"{directory} {what}; a checkpoint is made from a directory that holds its files, and that is "
            "there until the call that saves it has returned"
        )


# ------------------------------------------------------------------------------ a whole checkpoint


def _whole_checkpoint(directory: Path) -> Manifest | None:
    """What a directory says that is a whole checkpoint and nothing else; None if it is another one."""
    if not (directory / MANIFEST_NAME).is_file():
        return None
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        return None if foreign_names(directory) else manifest
    except (DamagedCheckpointError, OSError):
        return None


def _adopt(
    workspace: Workspace, directory: Path, manifest: Manifest, said: Description, lineage: Lineage
) -> Manifest:
    for name in manifest.directories:
        workspace.make_directory(name)
    for name in manifest.files:
        workspace.adopt(name, directory / name)
    try:
        check_files(directory, manifest)
    except DamagedCheckpointError as error:
        raise DirectoryNotSavableError(f"{error}; nothing was committed") from error
    both = replace(
        said,
        epoch=manifest.epoch if said.epoch is None else said.epoch,
        metrics={**manifest.metrics, **said.metrics},
        tags=manifest.tags + tuple(tag for tag in said.tags if tag not in manifest.tags),
        environment={**manifest.environment, **said.environment},
    )
    files = {name: replace(entry, within=None) for name, entry in manifest.files.items()}
    return commit(workspace, files, both, lineage, directories=manifest.directories)


# ----------------------------------------------------------------------------- any other directory


@dataclass(slots=True)
class _Found:
    """What a directory holds: files, and empty directories."""

    files: list[SourceFile] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)


def _copy(
    workspace: Workspace,
    directory: Path,
    said: Description,
    lineage: Lineage,
    copier: Copier,
    previous: Committed | None,
) -> Manifest:
    found = _walk(directory)
    for name in found.directories:
        workspace.make_directory(name)
    linked = {}
    for source in found.files:
        entry = _link(workspace, source, previous) if previous is not None else None
        if entry is not None:
            linked[source.name] = entry
    copied = copier.copy(workspace, [source for source in found.files if source.name not in linked])
    files = {source.name: linked.get(source.name) or copied[source.name] for source in found.files}
    return commit(workspace, files, said, lineage, directories=found.directories)


def _walk(directory: Path) -> _Found:
    found = _Found()
    left = [(HANDED_OVER, str(directory))]
    while left:
        name, path = left.pop()
        with reading_source(path), os.scandir(path) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            _take(found, left, f"{name}/{entry.name}", entry)
        if not entries:
            found.directories.append(name)
    found.files.sort()
    return found


def _take(found: _Found, left: list[tuple[str, str]], name: str, entry: os.DirEntry[str]) -> None:
    problem = problem_of_name(name)
    if problem is not None:
        raise DirectoryNotSavableError(
            f"{entry.path!r} can't be kept in a checkpoint: {problem}. Rename it; nothing was committed"
        )
    with reading_source(entry.path):
        seen = entry.stat(follow_symlinks=False)
    if stat.S_ISDIR(seen.st_mode):
        left.append((name, entry.path))
    elif stat.S_ISREG(seen.st_mode):
        found.files.append(SourceFile(name, entry.path, seen.st_size, stamp_of(seen)))
    else:
        kind = "a link" if stat.S_ISLNK(seen.st_mode) else "neither a file nor a directory"
        raise DirectoryNotSavableError(
            f"{entry.path} is {kind}; a checkpoint holds plain files and directories. Copy what it stands "
            "for into the directory, or leave it out; nothing was committed"
        )


# ------------------------------------------------------------------------------------------- links


def _link(workspace: Workspace, source: SourceFile, previous: Committed) -> FileEntry | None:
    """Link a file that did not change since the checkpoint before; None if it has to be copied."""
    entry = previous.manifest.files.get(source.name)
    if entry is None or entry.bytes != source.bytes or entry.bytes < _LINKED_FROM_BYTES:
        return None
    try:
        if not _looks_alike(source, previous.place, entry):
            return None
        if _digest_of(source) != entry.digest:
            return None
        name = source_of(previous.place).name
        within = workspace.link(source.name, name, source.name, replace(entry, within=None))
    except OSError:
        return None  # it was deleted meanwhile, or the place refuses: then it is written
    check_unchanged(source)
    return replace(entry, within=within)


def _looks_alike(source: SourceFile, place: Place, entry: FileEntry) -> bool:
    """A look at a few places, which spares hashing most files that did change."""
    with reading_source(source.path):
        fd = os.open(source.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        file = source_of(place).open(source.name, entry)
        try:
            return all(
                os.pread(fd, _SAMPLE_BYTES, offset) == file.read(offset, _SAMPLE_BYTES)
                for offset in (source.bytes // 2, source.bytes // 4, source.bytes - _SAMPLE_BYTES, 0)
            )
        finally:
            file.close()
    finally:
        os.close(fd)


def _digest_of(source: SourceFile) -> str:
    hasher = xxhash.xxh3_128()
    with reading_source(source.path), open(source.path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()
