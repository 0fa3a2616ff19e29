"""What waits for the mirror: the files of checkpoints under second names, which no pruning takes."""

from __future__ import annotations

import logging
from pathlib import Path

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from keepstep.checkpoint.format.names import directories_within
from keepstep.checkpoint.keeping import catalog
from keepstep.files import Files

__all__ = ["link_if_whole", "link_upload"]

log = logging.getLogger(__name__)


def link_upload(files: Files, uploads: Path, directory: Path, manifest: Manifest) -> Path:
    """Give a checkpoint's files second names below `uploads`, the manifest last; where they are.

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
    files.make_directory(target)
    inner = directories_within(manifest.files, manifest.directories)
    for name in inner:
        files.make_directory(target / name)
    for name in [*manifest.files, MANIFEST_NAME]:
        files.link(directory / name, target / name)
    for name in inner:
        files.sync_directory(target / name)
    return target


def link_if_whole(files: Files, uploads: Path, entry: catalog.Entry) -> Path | None:
    """As `link_upload`; None, and a warning, if the checkpoint is damaged or was deleted meanwhile.

    What lacks a file would keep all others from the mirror, in every run.
    """
    assert isinstance(entry.path, Path)
    assert entry.manifest is not None
    problem = catalog.problem_of(entry)
    if problem is None or problem.refused:
        try:
            return link_upload(files, uploads, entry.path, entry.manifest)
        except FileNotFoundError as error:
            problem = catalog.Problem(f"{error.filename} is gone", refused=False)
    log.warning("%s is not mirrored: %s", entry.path, problem.reason)
    return None
