"""Bringing what a mirror holds to a directory that has nothing as new, or only a damaged one."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Final

from keepstep.checkpoint.crew import in_threads
from keepstep.checkpoint.format.manifest import MANIFEST_NAME, FileEntry, Manifest, dump_manifest
from keepstep.checkpoint.format.parse import check_files, read_manifest
from keepstep.checkpoint.format.source import OpenFile, source_of
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.refusal import is_refusal, refused
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.errors import (
    BucketError,
    DamagedCheckpointError,
    NoValidCheckpointError,
    StoreBusyError,
    StoreError,
    StoreReadOnlyError,
)
from keepstep.files import PAGE_BYTES, Files
from keepstep.outcome import Latch
from keepstep.pages import huge_pages

__all__ = ["pull_if_newer"]

_BLOCK_BYTES: Final = 8 << 20
_FETCHES_AT_ONCE: Final = 8

log = logging.getLogger(__name__)


def pull_if_newer(bucket: BucketBackend, local: LocalBackend, files: Files) -> Path | None:
    """Bring the newest checkpoint of a mirror to a directory, if that has none as new and the mirror answers.

    Raises:
        StoreError: nothing is here, and the mirror can't be read; or it is newer and can't be brought.
        NoValidCheckpointError: nothing is here, and all that the mirror holds is damaged.
    """
    try:
        return _pull_newest(bucket, local, files)
    except BucketError as error:
        if not catalog.scan(local):
            raise
        log.warning("no newer checkpoint could be taken from the mirror: %s", error)
        return None


def _pull_newest(bucket: BucketBackend, local: LocalBackend, files: Files) -> Path | None:
    """Bring the newest sound checkpoint of a mirror to a directory, if that has none as new.

    It is read into an unfinished directory, every byte is verified, and one rename publishes it. A damaged
    checkpoint of that number is set aside first.

    Args:
        bucket: the mirror.
        local: the directory of the store; this process becomes the one that writes there if it must.
        files: how the disk is changed.

    Returns:
        Where it lies now; None if the directory is as new as the mirror.

    Raises:
        BucketError: the mirror can't be read.
        StoreError: it is newer, and what is newer can't be brought here, may well be whole though it can't
            be read, or is of another run.
        NoValidCheckpointError: nothing is here, and all that the mirror holds is damaged.
    """
    mirrored = catalog.scan(bucket)  # first: what another process saves meanwhile is here before it is there
    here = catalog.scan(local)
    newest = max((entry.number for entry in here if not _is_damaged(entry)), default=-1)
    if mirrored and mirrored[-1].number > newest and not _shares_a_run(here, mirrored):
        raise StoreError(
            f"the mirror {bucket} holds newer checkpoints than {local}, but of another run: nothing was "
            "taken from there. Give this run a mirror of its own; or, to go on from the mirror, an empty "
            "directory"
        )
    damaged = []
    for entry in reversed(mirrored):
        if entry.number <= newest:
            return None
        try:
            return _pull(entry, local, files)
        except DamagedCheckpointError as error:
            if is_refusal(error):
                raise refused(error.path, error.message) from error
            log.error("%s is damaged and is passed over: %s", entry.path, error.message)
            damaged.append(f"{entry.name}: {error.message}")
    if damaged and not here:
        raise NoValidCheckpointError(
            f"{local} is empty, and every checkpoint of its mirror {bucket} is damaged:\n  "
            + "\n  ".join(damaged)
            + "\nRestore one of them from a copy, or give the run another mirror to start over"
        )
    return None


def _is_damaged(entry: catalog.Entry) -> bool:
    """Whether it is known to be; one that can't be read may well be whole, and needs no copy."""
    problem = catalog.problem_of(entry)
    return problem is not None and not problem.refused


def _shares_a_run(here: list[catalog.Entry], mirrored: list[catalog.Entry]) -> bool:
    """Whether a mirror may be one of this directory; who has nothing, or nothing readable, can't tell."""
    ours = {entry.manifest.run for entry in here if entry.manifest}
    theirs = {entry.manifest.run for entry in mirrored if entry.manifest}
    return not ours or not theirs or not ours.isdisjoint(theirs)


def _pull(entry: catalog.Entry, local: LocalBackend, files: Files) -> Path:
    if entry.manifest is None:
        problem = entry.problem or "its manifest can't be read"
        raise refused(entry.path, problem) if entry.refused else DamagedCheckpointError(entry.path, problem)
    log.info("pulling %s", entry.path)
    try:
        return _bring(entry, entry.manifest, local, files)
    except (BucketError, StoreBusyError, StoreReadOnlyError) as error:
        raise StoreError(
            f"{entry.path} is newer than all in {local}, and could not be brought here: {error}. "
            "Nothing older was taken in its place. Start again when that is mended, or go on "
            "from what is here without the mirror"
        ) from error


def _bring(entry: catalog.Entry, mirrored: Manifest, local: LocalBackend, files: Files) -> Path:
    check_files(entry.path, mirrored)
    local.claim()
    final = local.path / entry.name
    manifest = replace(
        mirrored, files={name: replace(file, within=None) for name, file in mirrored.files.items()}
    )
    workspace = LocalWorkspace(files, final, may_replace=False)
    with workspace.explained():
        if not (catalog.has_lost_manifest(final) or source_of(final).has_manifest()):
            workspace.check()  # what is not ours is in the way: nothing is fetched in vain
        try:
            workspace.open()
            for name in manifest.directories:
                workspace.make_directory(name)
            for name, file in mirrored.files.items():
                _fetch(entry, workspace, name, file)
            data = dump_manifest(manifest)
            workspace.write_file(MANIFEST_NAME, data)
            report = verify_checkpoint(workspace.path)
            if report.refused:
                raise refused(workspace.path, "; ".join(report.problems))
            if not report.sound:
                raise DamagedCheckpointError(entry.path, "; ".join(report.problems))
            _make_way(final, local)
            workspace.commit(data)
        finally:
            workspace.discard()
    return final


def _make_way(final: Path, local: LocalBackend) -> None:
    """Set a damaged checkpoint of that name aside, one that has lost its manifest included.

    One that is whole was saved meanwhile, and stays.
    """
    if catalog.has_lost_manifest(final):
        log.error("%s is set aside, as the mirror holds it with its manifest", final)
        local.set_aside(final)
    elif source_of(final).has_manifest():
        try:
            check_files(final, read_manifest(final))
        except DamagedCheckpointError as error:
            if is_refusal(error):
                raise  # it may well be whole
            log.error("%s is set aside, as the mirror holds a sound copy: %s", final, error.message)
            local.set_aside(final)


def _fetch(entry: catalog.Entry, workspace: LocalWorkspace, name: str, file: FileEntry) -> None:
    """One file, in blocks that its segment takes as they are, several at once."""
    opened = source_of(entry.path).open(name, file)
    segment = workspace.create_segment(name, file.bytes)
    begins = range(0, file.bytes, _BLOCK_BYTES)
    left, taking, stopped = iter(begins), threading.Lock(), Latch()

    def work() -> None:
        block = huge_pages(_BLOCK_BYTES)
        while not stopped.is_open:
            with taking:
                begin = next(left, None)
            if begin is None:
                return
            try:
                size = min(_BLOCK_BYTES, file.bytes - begin)
                _read_block(entry, opened, name, block[:size], begin)
                segment.write_at(block[: -(-size // PAGE_BYTES) * PAGE_BYTES], begin)
            except BaseException:
                stopped.open()
                raise

    try:
        count = min(_FETCHES_AT_ONCE, len(begins))
        errors = in_threads(work, count, name="keepstep-pull", stop=stopped.open, daemon=True)
        if errors:
            raise errors[0]
        segment.finish()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(entry.path, f"{name} is missing ({error.filename})") from error
    finally:
        segment.abandon()


def _read_block(entry: catalog.Entry, opened: OpenFile, name: str, block: memoryview, begin: int) -> None:
    done = 0
    while done < len(block):
        count = opened.read_into(block[done:], begin + done)
        if count == 0:
            raise DamagedCheckpointError(entry.path, f"{name} ends at byte {begin + done}")
        done += count
