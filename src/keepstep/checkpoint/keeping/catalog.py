"""Which checkpoints a store holds. No torch: listing thousands takes a fraction of a second.

Nothing is cached on disk: the manifests are the truth.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from keepstep.checkpoint.crew import in_threads
from keepstep.checkpoint.format.known import KnownManifests
from keepstep.checkpoint.format.manifest import MANIFEST_NAME, STATE_NAME, Manifest
from keepstep.checkpoint.format.parse import check_files, read_manifest
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.keeping.refusal import is_refusal
from keepstep.checkpoint.place.backend import INTERNAL_NAME, Backend, checkpoint_name
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, UsageError
from keepstep.files import LocalFiles
from keepstep.outcome import Latch

__all__ = [
    "INTERNAL_NAME",
    "Entry",
    "Problem",
    "Root",
    "backend_of",
    "best_of",
    "checkpoint_name",
    "disk_bytes",
    "find",
    "has_lost_manifest",
    "is_checkpoint",
    "names_set_aside",
    "next_number",
    "number_of",
    "problem_of",
    "scan",
]

Root: TypeAlias = Path | Backend
"""A store: its directory, or another kind of place."""


def backend_of(root: Root) -> Backend:
    """The place of a store."""
    return LocalBackend(LocalFiles(), root) if isinstance(root, Path) else root


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One checkpoint of a store.

    Attributes:
        path: its directory, or where else it lies.
        number: from its name; later ones are larger.
        manifest: None if it can't be read.
        problem: why it can't, else None.
        refused: that says nothing of its bytes, see `Problem`.
    """

    path: Place
    number: int
    manifest: Manifest | None
    problem: str | None = None
    refused: bool = False

    @property
    def name(self) -> str:
        """Its name."""
        return self.path.name


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has a manifest (which says nothing about its health)."""
    return (directory / MANIFEST_NAME).is_file()


def has_lost_manifest(directory: Path) -> bool:
    """Whether a directory has what keepstep writes beside a manifest, and none."""
    return os.path.isfile(directory / STATE_NAME) and not source_of(directory).has_manifest()


def scan(root: Root, known: KnownManifests | None = None) -> list[Entry]:
    """Every checkpoint of a store, oldest first, damaged manifests included.

    Directories without a manifest are not checkpoints and are left out.

    Args:
        root: of the store.
        known: manifests that need not be read again; None: all are read.
    """
    backend = backend_of(root)
    found = backend.checkpoints()
    read = read_manifest
    if known is not None:
        known.keep({place for _, place in found})
        read = known.read
    if backend.scan_threads > 1 and len(found) > 1:
        entries = _entries(found, backend.scan_threads, read)
    else:
        entries = [_entry(numbered, read) for numbered in found]
    return [entry for entry in entries if entry is not None]


_Read = Callable[[Place], Manifest]


def _entries(found: Sequence[tuple[int, Place]], count: int, read: _Read) -> list[Entry | None]:
    """All at once; no executor, since those take no work once the interpreter exits, and uploads go on."""
    entries: list[Entry | None] = [None] * len(found)
    stopped = Latch()
    left = iter(range(len(found)))
    taking = threading.Lock()

    def work() -> None:
        while not stopped.is_open:
            with taking:
                index = next(left, None)
            if index is None:
                return
            try:
                entries[index] = _entry(found[index], read)
            except BaseException:
                stopped.open()
                raise

    errors = in_threads(work, min(count, len(found)), name="keepstep-scan", stop=stopped.open)
    if errors:
        raise errors[0]
    return entries


def _entry(numbered: tuple[int, Place], read: _Read) -> Entry | None:
    """What lies there; None if it has no manifest (any more)."""
    number, place = numbered
    try:
        return Entry(path=place, number=number, manifest=read(place))
    except DamagedCheckpointError as error:
        if source_of(place).has_manifest():
            refused = is_refusal(error)
            return Entry(path=place, number=number, manifest=None, problem=error.message, refused=refused)
        return None


class Problem(NamedTuple):
    """What is wrong with a checkpoint.

    Attributes:
        reason: in words.
        refused: it may well be whole: the system refuses to read it, or a newer keepstep wrote it.
    """

    reason: str
    refused: bool

    @property
    def health(self) -> str:
        """In one word."""
        return "unreadable" if self.refused else "damaged"


def problem_of(entry: Entry) -> Problem | None:
    """What is wrong with a checkpoint as far as it can be seen without reading its data, or None."""
    if entry.manifest is None:
        return Problem(entry.problem or "its manifest can't be read", entry.refused)
    try:
        check_files(entry.path, entry.manifest)
    except DamagedCheckpointError as error:
        return Problem(error.message, is_refusal(error))
    return None


def names_set_aside(root: Root) -> list[str]:
    """The damaged checkpoints that a resume has moved out of the way, oldest first."""
    return [source_of(place).name for _, place in backend_of(root).set_aside_before()]


def next_number(root: Root) -> int:
    """A number larger than any that this store has seen, those set aside included."""
    return backend_of(root).next_number()


def find(root: Root, name: str) -> Entry:
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
