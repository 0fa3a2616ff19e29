"""Damaged checkpoints are moved out of the way, never deleted: a person may want what is left of them."""

from __future__ import annotations

import secrets
from pathlib import Path

from keepstep.checkpoint.keeping.catalog import INTERNAL_NAME
from keepstep.files import Files

__all__ = ["set_aside"]


def set_aside(files: Files, root: Path, directory: Path) -> Path:
    """Move a checkpoint of the store at `root` into `.keepstep/damaged/`; its number is never used again.

    Returns:
        Where it lies now.

    Raises:
        OSError: the disk refuses; it is where it was.
    """
    place = root / INTERNAL_NAME / "damaged"
    target = place / directory.name
    if target.exists():
        target = target.with_name(f"{directory.name}.{secrets.token_hex(4)}")
    files.make_directory(place)
    files.rename(directory, target)
    files.sync_directory(place)  # first where it is now, then where it is no more
    files.sync_directory(root)
    return target
