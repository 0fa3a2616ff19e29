"""Which checkpoints a directory holds. No torch: listing thousands takes a fraction of a second.

Nothing is cached on disk: the manifests are the truth.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from keepstep.checkpoint.format.parse import check_files, read_manifest
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, UsageError

__all__ = [
    "INTERNAL_NAME",
    "Entry",
    "best_of",
    "checkpoint_name",
    "damage_of",
    "disk_bytes",
    "find",
    "is_checkpoint",
    "names_set_aside",
    "next_number",
    "number_of",
    "scan",
]

INTERNAL_NAME = ".keepstep"
"""keepstep's own corner of a store: the lock, the trash, and damaged checkpoints that were set aside."""

_NAME = re.compile(r"checkpoint_(0|[1-9][0-9]{0,17})\Z")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One checkpoint directory of a store.

    Attributes:
        path: the directory.
        number: from its name; later ones are larger.
        manifest: None if it can't be read.
        problem: why it can't, else None.
    """

    path: Path
    number: int
    manifest: Manifest | None
    problem: str | None = None

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.name


def checkpoint_name(number: int) -> str:
    """The directory name of the checkpoint with this number."""
    return f"checkpoint_{number}"


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has a manifest (which says nothing about its health)."""
    return (directory / MANIFEST_NAME).is_file()


def _numbered(root: Path) -> list[tuple[int, Path]]:
    try:
        with os.scandir(root) as entries:
            found = [
                (int(match[1]), Path(e.path))
                for e in entries
                if (match := _NAME.match(e.name)) and e.is_dir()
            ]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointNotFoundError(f"{root} is a file; give a directory that holds checkpoints") from None
    return sorted(found)


def scan(root: Path) -> list[Entry]:
    """Every checkpoint of a store, oldest first, damaged manifests included.

    Directories without a manifest are not checkpoints and are left out.
    """
    entries = []
    for number, path in _numbered(root):
        try:
            entries.append(Entry(path=path, number=number, manifest=read_manifest(path)))
        except DamagedCheckpointError as error:
            if os.path.lexists(path / MANIFEST_NAME):
                entries.append(Entry(path=path, number=number, manifest=None, problem=error.message))
    return entries


def damage_of(entry: Entry) -> str | None:
    """What is wrong with a checkpoint as far as it can be seen without reading its data, or None."""
    if entry.manifest is None:
        return entry.problem
    try:
        check_files(entry.path, entry.manifest)
    except DamagedCheckpointError as error:
        return error.message
    return None


def names_set_aside(root: Path) -> list[str]:
    """The damaged checkpoints that a resume has moved out of the way, oldest first."""
    return [path.name for _, path in _numbered(root / INTERNAL_NAME / "damaged")]


def next_number(root: Path) -> int:
    """A number larger than any that this store has seen, those set aside included."""
    seen = [number for place in (root, root / INTERNAL_NAME / "damaged") for number, _ in _numbered(place)]
    return max(seen, default=-1) + 1


def find(root: Path, name: str) -> Entry:
    """The checkpoint of that name.

    Raises:
        CheckpointNotFoundError: there is none; the message lists the newest names.
    """
    entries = scan(root)
    for entry in entries:
        if entry.name == name:
            return entry
    newest = ", ".join(entry.name for entry in entries[-5:]) or "none"
    raise CheckpointNotFoundError(f"there is no checkpoint {name!r} in {root}; the newest are: {newest}")


def number_of(metrics: Mapping[str, object], name: str) -> int | float | None:
    """A metric that can be compared; None if it is missing, NaN, or no number."""
    value = metrics.get(name)
    if not isinstance(value, int | float) or (isinstance(value, float) and math.isnan(value)):
        return None
    return value


def best_of(entries: Iterable[Entry], metric: str, mode: Literal["min", "max"]) -> Entry | None:
    """The entry with the best value of a metric; the newest of equals; None if no entry has a number there.

    Raises:
        UsageError: `mode` is neither "min" nor "max".
    """
    if mode not in ("min", "max"):
        raise UsageError(f"mode is {mode!r}; allowed: 'min' or 'max'")
    best: Entry | None = None
    best_value: int | float = 0
    for entry in entries:
        value = number_of(entry.manifest.metrics, metric) if entry.manifest else None
        if value is None:
            continue
        if best is None or (value <= best_value if mode == "min" else value >= best_value):
            best, best_value = entry, value
    return best


def disk_bytes(*directories: Path) -> int:
    """Bytes that directories take on disk, a file with several names counted once.

    What is deleted meanwhile, or can't be listed, is not counted.
    """
    seen: set[tuple[int, int]] = set()
    total = 0
    left: list[str | Path] = [*directories]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        total += found.st_size
        except OSError:
            continue
    return total
