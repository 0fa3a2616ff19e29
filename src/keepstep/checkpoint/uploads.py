"""What waits for the mirror: the files of checkpoints under second names, which no pruning takes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from keepstep.checkpoint.format.names import directories_within
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.refusal import is_refusal
from keepstep.checkpoint.keeping.retention import Retention, decide
from keepstep.errors import DamagedCheckpointError, StoreError
from keepstep.files import Files

__all__ = ["Lacking", "lacking", "left_over", "link_if_there", "link_upload"]

log = logging.getLogger(__name__)


def link_upload(files: Files, uploads: Path, directory: Path, manifest: Manifest) -> Path:
    """Give a checkpoint's files second names below `uploads`, the manifest last; where they are.

    Of a link that fails halfway nothing is left: its names would hold what is deleted, and copies room.

    Raises:
        FileNotFoundError: one is missing.
        OSError: the disk refuses.
    """
    target = uploads / f"{directory.name}.{manifest.id}"
    if (target / MANIFEST_NAME).exists():
        return target
    files.make_directory(uploads)
    if target.exists():
        files.remove_tree(target)
    try:
        _link_all(files, directory, target, manifest)
    except BaseException:
        with contextlib.suppress(OSError):
            files.remove_tree(target)
        raise
    return target


def _link_all(files: Files, directory: Path, target: Path, manifest: Manifest) -> None:
    files.make_directory(target)
    inner = directories_within(manifest.files, manifest.directories)
    for name in inner:
        files.make_directory(target / name)
    for name in [*manifest.files, MANIFEST_NAME]:
        files.link(directory / name, target / name)
    for name in inner:
        files.sync_directory(target / name)


def link_if_there(files: Files, uploads: Path, entry: catalog.Entry) -> Path | None:
    """As `link_upload`; None, and a warning, if the checkpoint was deleted meanwhile."""
    assert isinstance(entry.path, Path)
    assert entry.manifest is not None
    try:
        return link_upload(files, uploads, entry.path, entry.manifest)
    except FileNotFoundError as error:
        log.warning("%s is not mirrored: %s is gone", entry.path, error.filename)
        return None


def left_over(files: Files, uploads: Path) -> tuple[list[tuple[Path, Manifest]], list[StoreError]]:
    """What was linked and waits still, and why some of it can't be read; what was cut off is removed."""
    found, unread = [], []
    for directory in sorted(uploads.iterdir()) if uploads.is_dir() else []:
        try:
            found.append((directory, read_manifest(directory)))
        except DamagedCheckpointError as error:
            if is_refusal(error):  # it may be the only copy of a whole checkpoint
                log.warning("%s stays, and is not mirrored for now: %s", directory, error.message)
                unread.append(StoreError(f"{directory} can't be read: {error.message}"))
            else:
                files.remove_tree(directory)
    return found, unread


class Lacking(NamedTuple):
    """What a directory holds and its mirror does not.

    Attributes:
        entries: those that would stay there, and are whole as far as can be seen without reading their data.
        unread: why others can't be read that may be as good.
        taken: names that the mirror has given to other checkpoints.
    """

    entries: Sequence[catalog.Entry]
    unread: Sequence[StoreError]
    taken: Sequence[str]


def lacking(root: Path, mirrored: Sequence[catalog.Entry], retention: Retention) -> Lacking:
    """What is only here, and would stay in the mirror; damaged ones are named in a warning and left out.

    What lacks a file would keep all others from the mirror, in every run, and the rules would want it in the
    stead of a sound one.

    Args:
        root: the directory.
        mirrored: what the mirror holds.
        retention: of the mirror.
    """
    there = {entry.name: entry.manifest.id for entry in mirrored if entry.manifest}
    here = catalog.scan(root)
    readable = [entry for entry in here if entry.manifest and entry.name not in there]
    both = sorted([*mirrored, *filter(_is_whole, readable)], key=lambda entry: entry.number)
    kept = [choice.entry for choice in decide(both, retention) if choice.keep]
    newest = both[-1].number if both else -1
    return Lacking(
        entries=[entry for entry in kept if entry.name not in there],
        unread=[
            StoreError(f"{entry.path} can't be read: {entry.problem}")
            for entry in here
            if entry.refused
            and entry.name not in there
            and (retention.keeps_all or entry.number > newest)  # of others the rules can't tell
        ],
        taken=[e.name for e in here if e.name in there and e.manifest and e.manifest.id != there[e.name]],
    )


def _is_whole(entry: catalog.Entry) -> bool:
    """Whether nothing is known to be wrong with it."""
    problem = catalog.problem_of(entry)
    if problem is None or problem.refused:
        return True
    log.warning("%s is not mirrored: %s", entry.path, problem.reason)
    return False
