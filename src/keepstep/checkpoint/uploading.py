"""One checkpoint of a directory -> the mirror: verified, linked where it can be, committed there."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from keepstep.checkpoint.format.manifest import FileEntry, Manifest, dump_manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.bucket_writing import BucketWorkspace
from keepstep.errors import DamagedCheckpointError, DirectoryNotOursError, StoreError

__all__ = ["upload_checkpoint"]

log = logging.getLogger(__name__)

_Holders = dict[tuple[str, str, int], str]


def upload_checkpoint(
    bucket: BucketBackend, directory: Path, name: str, manifest: Manifest, advance: Callable[[int], None]
) -> None:
    """Have a mirror hold a checkpoint under its own name; nothing is done if it does.

    Args:
        bucket: the mirror.
        directory: where the checkpoint lies.
        name: of the checkpoint.
        manifest: what was committed there.
        advance: is told of bytes that are there by now.

    Raises:
        DirectoryNotOursError: the mirror has another checkpoint of that name.
        DamagedCheckpointError: it is not what was committed (any more).
        StoreError: the bucket, or the disk, refuses.
    """
    bucket.claim()
    there = bucket.at(name)
    if there.exists():
        if read_manifest(there).id == manifest.id:
            return
        raise DirectoryNotOursError(
            errno.EEXIST, f"{there} is another checkpoint already; give each run a mirror of its own"
        )
    report = verify_checkpoint(directory)
    if report.refused:
        raise StoreError(f"{directory} can't be read: {'; '.join(report.problems)}")
    if not report.sound:
        raise DamagedCheckpointError(directory, "; ".join(report.problems))
    entries = catalog.scan(bucket)
    holders = _holders(entries)
    left = _left_of(name, manifest, [entry.manifest for entry in entries if entry.manifest])
    workspace = bucket.reserve_for(name, manifest.id, left)
    try:
        files = {
            file: _upload_file(workspace, directory, file, entry, holders, advance)
            for file, entry in manifest.files.items()
        }
        workspace.commit(dump_manifest(replace(manifest, files=files)))
    finally:
        workspace.discard()


def _left_of(name: str, manifest: Manifest, others: Iterable[Manifest]) -> set[str]:
    """The files of a checkpoint that others of the mirror name, with this content, below its name."""
    return {
        file
        for other in others
        for file, entry in other.files.items()
        if entry.within == name
        and (mine := manifest.files.get(file)) is not None
        and (mine.digest, mine.bytes) == (entry.digest, entry.bytes)
    }


def _holders(entries: Iterable[catalog.Entry]) -> _Holders:
    """Which checkpoint of the mirror holds a file of that name, digest and size."""
    holders: _Holders = {}
    for entry in entries:
        for name, file in entry.manifest.files.items() if entry.manifest else ():
            holders[name, file.digest, file.bytes] = entry.name
    return holders


def _upload_file(
    workspace: BucketWorkspace,
    directory: Path,
    name: str,
    entry: FileEntry,
    holders: _Holders,
    advance: Callable[[int], None],
) -> FileEntry:
    holder = holders.get((name, entry.digest, entry.bytes))
    if holder is not None:
        with contextlib.suppress(FileNotFoundError):
            within = workspace.link(name, holder, name, entry)
            advance(entry.bytes)
            return replace(entry, within=within)
    if workspace.has(name, entry.bytes):  # from an attempt that was cut off
        advance(entry.bytes)
    else:
        workspace.upload_file(name, directory / name, entry.bytes, advance)
        if not workspace.has(name, entry.bytes):
            raise DamagedCheckpointError(
                directory, f"{name} did not have its {entry.bytes} bytes when it was uploaded"
            )
    return replace(entry, within=None)
