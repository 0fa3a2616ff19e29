"""A directory that holds the checkpoints of one run, and who writes to it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
from pathlib import Path

from keepstep.checkpoint.format.manifest import CHECKPOINT_NAME, MANIFEST_NAME
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.place.backend import (
    INTERNAL_NAME,
    GuestWorkspace,
    HostWorkspace,
    Workspace,
    checkpoint_name,
)
from keepstep.checkpoint.place.claimant import Claimant, parse_claim, this_process
from keepstep.checkpoint.place.deletion import delete_checkpoint, empty_trash
from keepstep.checkpoint.place.joined import JoinedWorkspace
from keepstep.checkpoint.place.local import LocalWorkspace, explained, sweep
from keepstep.errors import CheckpointNotFoundError, StoreBusyError, StoreError
from keepstep.files import Files, free_bytes
from keepstep.locks import StoreLock

__all__ = ["LocalBackend", "forget_places_after_fork"]


log = logging.getLogger(__name__)


class _Places:
    """Where this process is saving: two stores of one path, or two threads, take different numbers."""

    def __init__(self) -> None:
        self.claiming = threading.RLock()  # of one thread twice: the handler of a signal may save as well
        self._guard = threading.RLock()
        self._taken: set[Path] = set()

    def take(self, backend: LocalBackend) -> Path:
        """The next free place of a store, kept free for the caller."""
        with self._guard:
            number, root = backend.next_number(), backend.path
            while not self._takes(root.resolve() / checkpoint_name(number)):
                number += 1
            return root / checkpoint_name(number)

    def _takes(self, place: Path) -> bool:
        if place in self._taken:
            return False
        self._taken.add(place)
        if os.path.lexists(place):  # the handler of a signal has saved since the number was looked up
            self._taken.discard(place)
            return False
        return True

    def taken(self, final: Path) -> bool:
        """Whether a save to `final` is in flight in this process."""
        with self._guard:
            return final.parent.resolve() / final.name in self._taken

    def release(self, final: Path) -> None:
        """The save to `final` is over."""
        with self._guard:
            self._taken.discard(final.parent.resolve() / final.name)


_places = _Places()


def forget_places_after_fork() -> None:
    """Saves in flight are the parent's business."""
    global _places  # noqa: PLW0603
    _places = _Places()


class LocalBackend:
    """A `Backend` that is a directory."""

    scan_threads = 1

    def __init__(self, files: Files, path: Path) -> None:
        self.path = path
        self._files = files
        self._owned: tuple[int, int] | None = None
        self.number_floor = 0
        """Numbers below this one are taken elsewhere: by the mirror."""

    def __str__(self) -> str:
        return str(self.path)

    def checkpoints(self) -> list[tuple[int, Place]]:
        return [*_numbered(self.path)]

    def set_aside_before(self) -> list[tuple[int, Place]]:
        return [*_numbered(self._damaged)]

    @property
    def _lock(self) -> Path:
        return self.path / INTERNAL_NAME / "lock"

    @property
    def _damaged(self) -> Path:
        return self.path / INTERNAL_NAME / "damaged"

    def next_number(self) -> int:
        seen = [number for place in (self.path, self._damaged) for number in _names_by_number(place)]
        return max(self.number_floor, max(seen, default=-1) + 1)

    def raise_floor(self, number: int) -> None:
        """Give no number below this one from now on."""
        self.number_floor = max(self.number_floor, number)

    def free_bytes(self) -> int | None:
        return free_bytes(self.path)

    def explained(
        self, place: Place | None = None, doing: str = "saving"
    ) -> contextlib.AbstractContextManager[None]:
        return explained(self._directory(place) if place is not None else self.path, doing)

    def claim(self) -> None:
        if self._owned is None or self._owned != _identity(self._lock):  # or the directory was moved away
            with explained(self.path), _places.claiming:
                self._take_lock()

    def _take_lock(self) -> None:
        internal = self._lock.parent
        self._files.make_directory(internal)
        before = self._last_writer()
        held_by = StoreLock.acquire(self._lock, this_process().dump(), lives=_lives)
        if held_by is not None:
            holder = parse_claim(held_by)[0] or "another process"
            raise StoreBusyError(
                f"{self.path} is being written to by {holder}. One process at a time may write to a store: "
                "stop that one, or give this run another directory"
            )
        sweep(
            self._files,
            self.path,
            in_flight=lambda name: _places.taken(self.path / name),
            alone=before is None or before.is_dead,
        )
        empty_trash(self._files, internal / "trash")
        self._owned = _identity(self._lock)

    def _last_writer(self) -> Claimant | None:
        with contextlib.suppress(OSError):
            return parse_claim(self._lock.read_bytes())[0]
        return None

    def guest(self) -> GuestWorkspace:
        return JoinedWorkspace(self._files)

    def reserve(self) -> HostWorkspace:
        return LocalWorkspace(self._files, _places.take(self), may_replace=False)

    def release(self, workspace: Workspace) -> None:
        _places.release(self._directory(workspace.final))

    def holds(self, place: Place) -> bool:
        return isinstance(place, Path) and place.parent.resolve() == self.path.resolve()

    def delete(self, place: Place) -> None:
        directory = self._directory(place)
        with explained(directory, "deleting"):
            delete_checkpoint(self._files, directory, self.path / INTERNAL_NAME / "trash")

    def set_aside(self, place: Place) -> Place:
        directory = self._directory(place)
        target = self._damaged / directory.name
        if target.exists():
            target = target.with_name(f"{directory.name}.{secrets.token_hex(4)}")
        self._files.make_directory(self._damaged)
        self._files.rename(directory, target)
        self._files.sync_directory(self._damaged)  # first where it is now, then where it is no more
        self._files.sync_directory(self.path)
        return target

    def _directory(self, place: Place) -> Path:
        assert isinstance(place, Path), f"{place} is no directory"
        return place


def _lives(said: bytes) -> bool:
    """Whether a living process of this machine, but this one, has said this of itself."""
    who = parse_claim(said)[0]
    return who is not None and who.lives_here and not who.is_here


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _numbered(root: Path) -> list[tuple[int, Path]]:
    return [(number, root / name) for number, name in sorted(_names_by_number(root).items())]


def _names_by_number(root: Path) -> dict[int, str]:
    """Directories that are called like checkpoints; each save looks, so a thousand must be no burden."""
    try:
        with os.scandir(root) as entries:
            found = [
                (int(match[1]), entry.name)
                for entry in entries
                if (match := CHECKPOINT_NAME.match(entry.name)) and entry.is_dir()
            ]
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise CheckpointNotFoundError(f"{root} is a file; give a directory that holds checkpoints") from None
    except OSError as error:
        raise StoreError(
            f"{root} can't be listed: {error.strerror or error}. Give this process what it lacks "
            "(permission, say) and start it again"
        ) from error
    names = dict(found)
    return names if len(names) == len(found) else _one_of_each(root, found)


def _one_of_each(root: Path, found: list[tuple[int, str]]) -> dict[int, str]:
    """Where two names are one number, the one that is a checkpoint counts; of two, the shorter name."""

    def merit(numbered: tuple[int, str]) -> tuple[bool, int]:
        return os.path.lexists(root / numbered[1] / MANIFEST_NAME), -len(numbered[1])

    names = dict(sorted(found, key=merit))
    for number, name in found:
        if name != names[number]:
            log.warning(
                "%s is not looked at: %s has the same number. Rename one of them", root / name, names[number]
            )
    return names
