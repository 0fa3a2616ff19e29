"""What a PATH on the command line stands for: a store, a project with `checkpoints/`, or one checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, place_exists, source_of
from keepstep.checkpoint.keeping.catalog import (
    INTERNAL_NAME,
    Entry,
    Problem,
    is_checkpoint,
    names_set_aside,
    problem_of,
    scan,
)
from keepstep.checkpoint.place.registry import is_address, open_bucket
from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, UsageError
from keepstep.tune.experiment.journal import JOURNAL_NAME

__all__ = [
    "Found",
    "Leftover",
    "PlaceParameter",
    "all_set_aside",
    "choose",
    "health_of",
    "leftovers",
    "locate",
]

_PROJECT_CHECKPOINTS = "checkpoints"
_NUMBERED = re.compile(r"checkpoint_(\d{1,18})\Z", re.ASCII)
_SHOWN_NAMES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What lies at a PATH.

    Attributes:
        root: the store, or the one checkpoint; a string if it is the address of a bucket.
        entries: the checkpoints, oldest first; at least one, unless those set aside were asked for as well.
        is_store: False if PATH named one checkpoint.
    """

    root: Path | str
    entries: Sequence[Entry]
    is_store: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftover:
    """A directory in a store that is no checkpoint (any more).

    Attributes:
        path: the directory.
        kind: "unfinished", "replaced", "damaged", "trash" or "no-manifest".
        meaning: the kind in words.
    """

    path: Path
    kind: str
    meaning: str


_MEANINGS = {
    "unfinished": "a save under way, or left by a process that died; the next save to this store removes it",
    "replaced": "the older half of a replacement that was cut off",
    "damaged": "was found damaged when it was loaded and set aside",
    "trash": "a deletion that was cut off; the next save to this store finishes it",
    "no-manifest": "has no manifest.json, so it is no checkpoint",
}


class PlaceParameter(click.ParamType[Path | str]):
    """A PATH on the command line: a directory, or the address of a bucket."""

    name = "path"

    def convert(
        self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        return value if isinstance(value, str) and is_address(value) else Path(value)


def locate(path: Path | str, *, or_set_aside: bool = False) -> Found:
    """Find the checkpoints that `path` stands for.

    Args:
        path: a store, a project, or one checkpoint.
        or_set_aside: a store whose checkpoints were all set aside as damaged is found as well, without any.

    Raises:
        CheckpointNotFoundError: there is nothing, or no checkpoint there.
        StoreError, OSError: it can't be read.
    """
    if isinstance(path, str):
        return _locate_in_bucket(path.rstrip("/"), or_set_aside)
    try:
        path.stat()
    except FileNotFoundError:
        raise CheckpointNotFoundError(
            f"there is nothing at {path}; give a store, a project directory or a checkpoint"
        ) from None
    if not path.is_dir():
        raise CheckpointNotFoundError(
            f"{path} is a file; give a directory: a store, a project directory or a checkpoint"
        )
    root = path.resolve()  # "." and a link called "latest" have names too
    if is_checkpoint(root):
        return Found(root=root, entries=[_single(root)], is_store=False)
    candidates = [root, root / _PROJECT_CHECKPOINTS]
    for candidate in candidates:
        if entries := scan(candidate):
            return Found(root=candidate, entries=entries, is_store=True)
    for candidate in candidates if or_set_aside else ():
        if names_set_aside(candidate):
            return Found(root=candidate, entries=[], is_store=True)
    if beside := _named_otherwise(root):
        return Found(root=root, entries=beside, is_store=True)
    if (root / JOURNAL_NAME).is_file():
        raise CheckpointNotFoundError(
            f"{path} is an experiment of many trials: `keepstep tune ls {path}` lists them; each trial's "
            f"directory is a store for `keepstep ls {path}/TRIAL` and `keepstep verify {path}/TRIAL`"
        )
    aside = [left for candidate in candidates for left in leftovers(candidate)]
    listed = ", ".join(left.path.name for left in aside[:_SHOWN_NAMES])
    damaged = sum(left.kind == "damaged" for left in aside)
    raise CheckpointNotFoundError(
        f"there is no checkpoint in {path}"
        + (f", only {len(aside)} leftover(s) of earlier ones: {listed}" if aside else "")
        + (f", {damaged} of them set aside as damaged in {INTERNAL_NAME}/damaged" if damaged else "")
        + f"; a store holds directories named checkpoint_0, checkpoint_1 ..., a project has them in "
        f"{_PROJECT_CHECKPOINTS}/"
    )


def _locate_in_bucket(address: str, or_set_aside: bool) -> Found:
    store, _, name = address.rpartition("/")
    if _NUMBERED.match(name) and (source := open_bucket(store).at(name)).exists():
        return Found(root=address, entries=[_single(source)], is_store=False)
    for candidate in (address, f"{address}/{_PROJECT_CHECKPOINTS}"):
        bucket = open_bucket(candidate)
        if (entries := scan(bucket)) or (or_set_aside and names_set_aside(bucket)):
            return Found(root=candidate, entries=entries, is_store=True)
    raise CheckpointNotFoundError(
        f"there is no checkpoint at {address}; a store holds checkpoint_0/, checkpoint_1/ ..., a project has "
        f"them in {_PROJECT_CHECKPOINTS}/"
    )


def _named_otherwise(directory: Path) -> list[Entry]:
    """Checkpoints of names that a script chose, as by `save_state("out/epoch_1")`; oldest first."""
    paths = [directory / name for name in _names_in(directory) if not _NUMBERED.match(name)]
    entries = [_single(path) for path in paths if is_checkpoint(path)]
    return sorted(entries, key=lambda entry: entry.manifest.created_at if entry.manifest else "")


def all_set_aside(found: Found) -> str:
    """What to say of a store that was `found` without a checkpoint."""
    count = len(names_set_aside(open_bucket(found.root) if isinstance(found.root, str) else found.root))
    return (
        f"no checkpoint is left in {found.root}: all {count} were set aside as damaged, in "
        f"{INTERNAL_NAME}/damaged. Restore one from a copy"
    )


def _single(place: Place) -> Entry:
    match = _NUMBERED.match(source_of(place).name)
    number = int(match[1]) if match else 0
    try:
        return Entry(path=place, number=number, manifest=read_manifest(place))
    except DamagedCheckpointError as error:
        return Entry(path=place, number=number, manifest=None, problem=error.message)


def choose(found: Found, names: Sequence[str]) -> list[Entry]:
    """The checkpoints with these names; a number alone stands for checkpoint_<number>.

    Raises:
        CheckpointNotFoundError: one of them is not there; the message lists the newest.
        UsageError: names were given though PATH is one checkpoint already.
    """
    if names and not found.is_store:
        raise UsageError(f"{found.root} is one checkpoint already; leave out {', '.join(names)}")
    by_name = {entry.name: entry for entry in found.entries}
    chosen = []
    for name in names:
        entry = by_name.get(name.rstrip("/")) or by_name.get(f"checkpoint_{name}") or _numbered(found, name)
        if entry is None:
            newest = ", ".join(list(by_name)[-_SHOWN_NAMES:])
            raise CheckpointNotFoundError(
                f"there is no checkpoint {name!r} in {found.root}; the newest are: {newest or 'none'}"
            )
        chosen.append(entry)
    return chosen


def _numbered(found: Found, name: str) -> Entry | None:
    """The checkpoint of this number, however many zeros its name has."""
    match = _NUMBERED.match(f"checkpoint_{name.removeprefix('checkpoint_').rstrip('/')}")
    numbered = (entry for entry in found.entries if _NUMBERED.match(entry.name))
    return next((entry for entry in numbered if match and entry.number == int(match[1])), None)


def health_of(entries: Sequence[Entry]) -> list[tuple[Entry, Problem | None]]:
    """Each entry with what is wrong with it (None: nothing), as far as can be seen without reading data.

    What a training run deleted while we looked is no damage and is left out.
    """
    checked = [(entry, problem_of(entry)) for entry in entries]
    return [(entry, problem) for entry, problem in checked if problem is None or place_exists(entry.path)]


def leftovers(root: Path | str) -> list[Leftover]:
    """What else lies in a store that is a directory, in order of name."""
    if isinstance(root, str):
        return []
    found = []
    for name in _names_in(root):
        kind = None
        if ".tmp-" in name:
            kind = "unfinished"
        elif name.endswith(".replaced"):
            kind = "replaced"
        elif _NUMBERED.match(name) and not os.path.lexists(root / name / "manifest.json"):
            kind = "no-manifest"
        if kind is not None and (root / name).is_dir():
            found.append(Leftover(path=root / name, kind=kind, meaning=_MEANINGS[kind]))
    for kind in ("damaged", "trash"):
        place = root / INTERNAL_NAME / kind
        found += [
            Leftover(path=place / name, kind=kind, meaning=_MEANINGS[kind]) for name in _names_in(place)
        ]
    return found


def _names_in(directory: Path) -> list[str]:
    """Sorted; nothing if there is no such directory."""
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []
