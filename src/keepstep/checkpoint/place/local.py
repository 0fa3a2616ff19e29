"""The one commit point, and the unfinished directory that leads to it.

A checkpoint is built in `checkpoint_12.tmp-<token>/`, beside its final place. Everything in it is made
durable, then the manifest is written and made durable, then one rename publishes the directory. A
reader sees a whole checkpoint or none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from keepstep.checkpoint.format.known import KnownManifests
from keepstep.checkpoint.format.manifest import MANIFEST_NAME, FileEntry
from keepstep.checkpoint.format.names import directories_within
from keepstep.checkpoint.format.source import has_plain_parents
from keepstep.checkpoint.place.deletion import foreign_names, is_ours
from keepstep.disk_errors import disk_errors
from keepstep.errors import (
    DamagedCheckpointError,
    DirectoryNotOursError,
    StoreBusyError,
)
from keepstep.files import Files, SegmentFile
from keepstep.locks import DirectoryLock

__all__ = [
    "CommittedFiles",
    "LocalWorkspace",
    "explained",
    "link_whole",
    "replaced_path",
    "sweep",
]

_TMP = ".tmp-"
_UNFINISHED = re.compile(r"(.+)\.tmp-[0-9a-f]{12}\Z", re.DOTALL)
_REPLACED = ".replaced"

_LONG_DEAD_S = 24 * 3600.0

_unlocked: set[Path] = set()
"""Unfinished directories of this process on file systems that can't lock them."""

log = logging.getLogger(__name__)


def replaced_path(directory: Path) -> Path:
    """Where a replaced checkpoint waits for the new one, on systems that can't swap two names at once."""
    return directory.with_name(directory.name + _REPLACED)


def _unfinished_path(directory: Path) -> Path:
    """A new name of a directory that is not a checkpoint yet, or no longer."""
    return directory.with_name(f"{directory.name}{_TMP}{secrets.token_hex(6)}")


def explained(directory: Path, doing: str = "saving") -> contextlib.AbstractContextManager[None]:
    """Turn the operating system's refusals into keepstep's errors; `doing` says what was under way.

    Raises:
        NoSpaceError, StoreReadOnlyError, StoreError: with the directory and the way out.
    """
    return disk_errors(
        directory,
        doing,
        left="Other checkpoints are whole",
        room="keep fewer checkpoints (keep_last, byte_budget; of trials num_to_keep)",
    )


class CommittedFiles:
    """Files of committed checkpoints, for saves that link to them."""

    def __init__(self) -> None:
        self._known = KnownManifests()

    def find(self, directory: Path, file: str, committed: FileEntry) -> Path:
        """Where a file of a checkpoint lies.

        Raises:
            FileNotFoundError: it is not what was committed, or another checkpoint lies there by now.
        """
        source = directory / file
        if self._says(directory, file, committed):
            found = os.stat(source, follow_symlinks=False)
            plain = stat.S_ISREG(found.st_mode) and has_plain_parents(directory, file, set())
            if plain and found.st_size == committed.bytes:
                return source
        raise FileNotFoundError(errno.ENOENT, "not what was committed", str(source))

    def _says(self, directory: Path, file: str, committed: FileEntry) -> bool:
        """Whether the manifest in a directory says just this of a file."""
        try:
            return self._known.read(directory).files.get(file) == committed
        except DamagedCheckpointError:
            return False


def link_whole(files: Files, source: Path, target: Path) -> None:
    """Link a file, or copy it where the system has no links; nothing is left of a copy that was cut off."""
    try:
        files.link(source, target)
    except OSError:
        with contextlib.suppress(OSError):
            files.remove_file(target)
        raise


def _check_target(directory: Path) -> bool:
    """See whether a checkpoint may be published at `directory`.

    Returns:
        True if a keepstep checkpoint stands there and would be replaced.

    Raises:
        DirectoryNotOursError: it holds something else; nothing is touched.
    """
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise DirectoryNotOursError(
            errno.EEXIST, f"{directory} is a file; choose another directory"
        ) from None
    if not entries:
        return False
    if is_ours(directory):
        return True
    shown = ", ".join(sorted(entries)[:5])
    raise DirectoryNotOursError(
        errno.EEXIST,
        f"{directory} is not empty and was not written by keepstep (it holds {shown}). Nothing was changed. "
        "Choose an empty or new directory",
    )


class LocalWorkspace:
    """A `HostWorkspace` beside the final directory."""

    within = None

    def __init__(self, files: Files, final: Path, *, may_replace: bool = True) -> None:
        self.final = final
        self._may_replace = may_replace
        self.path = _unfinished_path(final)
        self._files = files
        self._lock: DirectoryLock | None = None
        self._unsynced: set[str] = set()
        self._directories: dict[str, None] = {}
        self._making = threading.Lock()
        self._committed = CommittedFiles()

    def check(self) -> None:
        _check_target(self.final)

    def explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.final)

    def open(self) -> None:
        self._files.make_directory(self.final.parent)
        sweep(self._files, self.final.parent, prefix=self.final.name)
        self._finish_replacement()
        while self._lock is None:
            self._files.make_unfinished(self.path)
            try:
                lock = DirectoryLock(self.path, wait=True)
            except FileNotFoundError:  # another process swept it before it was locked
                continue
            if lock.holds(self.path):
                self._lock = lock
                if not lock.supported:
                    _unlocked.add(self.path.resolve())
            else:
                lock.release()

    def make_directory(self, name: str) -> None:
        if name in self._directories:
            return
        with self._making:  # threads that write files may need the same one
            for directory in directories_within((), [name]):
                if directory not in self._directories:
                    self._files.make_unfinished(self.path / directory)
                    self._directories[directory] = None

    def _place(self, name: str) -> Path:
        """Where a file is to lie; its directory is there."""
        if "/" in name:
            self.make_directory(name.rpartition("/")[0])
        return self.path / name

    def create_segment(self, name: str, size_bytes: int) -> SegmentFile:
        self._unsynced.add(name)
        return self._files.create_segment(self._place(name), size_bytes, durable=False)

    def write_file(self, name: str, data: bytes) -> None:
        self._files.write_file(self._place(name), data, durable=False)
        self._unsynced.add(name)

    def adopt(self, name: str, path: Path) -> None:
        self._files.link(path, self._place(name))
        self._unsynced.add(name)  # who wrote it may not have waited for the disk

    def link(self, name: str, checkpoint: str, file: str, committed: FileEntry) -> str | None:
        source = self._committed.find(self.final.parent / checkpoint, file, committed)
        link_whole(self._files, source, self._place(name))
        return None

    def invitation(self) -> str:
        return json.dumps([str(self.path), str(self.final)])

    def take_over(self, files: Mapping[str, FileEntry]) -> None:
        """They lie in the directory."""

    def _finish_replacement(self) -> None:
        """End what a process began that died between the two renames, or just after them."""
        aside = replaced_path(self.final)
        if not os.path.lexists(aside) or not is_ours(aside):
            return
        if self.final.exists():
            self._remove_aside(aside)
        else:
            self._files.rename(aside, self.final)
            self._files.sync_directory(self.final.parent)

    def commit(self, manifest: bytes) -> None:
        """Make what is not durable yet so, and publish."""
        replaces = _check_target(self.final)
        if replaces and not self._may_replace:
            raise StoreBusyError(
                f"{self.final} was written by another process meanwhile. One process at a time may write to "
                "a store: stop that one, or give this run another directory"
            )
        if replaces:
            self._keep_foreign_files()
        self.write_file(MANIFEST_NAME, manifest)
        self._files.sync(self.path, [*self._directories, *sorted(self._unsynced)])
        if not replaces:
            self._files.rename(self.path, self.final)  # <- commit: after this line the checkpoint exists
            self._files.sync_directory(self.final.parent)
        elif self._files.exchange(self.path, self.final):  # <- commit, in place of an older one
            self._files.sync_directory(self.final.parent)
            _remove_if_possible(self._files, self.path)
        else:
            self._replace_in_two_steps()
        self._release()

    def discard(self) -> None:
        """Remove what was written. Never raises: the error that led here is the one that counts."""
        try:
            self._files.remove_tree(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning(
                "could not remove the unfinished %s (%s); the next save tries again", self.path, error
            )
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            _unlocked.discard(self.path.resolve())

    def _keep_foreign_files(self) -> None:
        """What somebody put beside an older checkpoint stays beside the new one."""
        for name in foreign_names(self.final):
            target = self._place(name)
            if os.path.lexists(target):
                raise DirectoryNotOursError(
                    errno.EEXIST,
                    f"{self.final / name} was not written by keepstep, and the new checkpoint has a file of "
                    "that name. Nothing was changed. Move it away, or choose another directory",
                )
            _link_tree(self._files, self.final / name, target)

    def _replace_in_two_steps(self) -> None:
        aside = replaced_path(self.final)
        if os.path.lexists(aside):
            raise DirectoryNotOursError(
                errno.EEXIST, f"{aside} is in the way while {self.final} is replaced; move it away"
            )
        self._files.rename(self.final, aside)
        self._files.rename(self.path, self.final)  # <- commit; until here readers find `aside`
        self._files.sync_directory(self.final.parent)
        self._remove_aside(aside)

    def _remove_aside(self, aside: Path) -> None:
        doomed = _unfinished_path(self.final)  # a name that is swept, should the removal be cut off
        self._files.rename(aside, doomed)
        self._files.sync_directory(self.final.parent)
        _remove_if_possible(self._files, doomed)


def _link_tree(files: Files, source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        files.make_directory(target)
        for entry in sorted(os.listdir(source)):
            _link_tree(files, source / entry, target / entry)
        files.sync_directory(target)
    else:
        files.link(source, target)


def sweep(
    files: Files,
    parent: Path,
    *,
    prefix: str = "",
    in_flight: Callable[[str], bool] = lambda _: False,
    alone: bool = False,
) -> None:
    """Remove unfinished checkpoints of dead processes; those of living ones are locked and stay.

    Args:
        files: how the disk is changed.
        parent: where they lie.
        prefix: only those that were to become this name.
        in_flight: whether this process is saving under a name; it may not have come to the lock yet.
        alone: whether no other process may be at it, so that those go as well that can't be locked. Else
            they go when nobody has touched them for a day.
    """
    for entry in os.listdir(parent):
        match = _UNFINISHED.match(entry)
        if match is None or (prefix and match[1] != prefix):
            continue
        path = parent / entry
        try:
            lock = DirectoryLock(path)
        except OSError:  # locked by the process that writes it, or not a directory
            continue
        try:
            unlocked = path.resolve() not in _unlocked and (alone or _is_old(path))
            dead = lock.supported or unlocked
            if dead and not in_flight(match[1]) and not path.is_symlink():
                log.info("removing %s, left unfinished by a process that died", path)
                _remove_if_possible(files, path)
        finally:
            lock.release()


def _is_old(path: Path) -> bool:
    """Whether nobody has touched a directory and what lies in it for a day: nobody can be at it."""
    try:
        touched = [os.lstat(path).st_mtime]
        for within, _, names in os.walk(path):
            touched += [os.lstat(os.path.join(within, name)).st_mtime for name in names]
    except OSError:  # somebody is at it
        return False
    return time.time() - max(touched) > _LONG_DEAD_S


def _remove_if_possible(files: Files, path: Path) -> None:
    """What can't go now is no reason to refuse a save; the next sweep tries again."""
    try:
        files.remove_tree(path)
    except OSError as error:
        if path.exists():
            log.warning("could not remove %s (%s); the next save tries again", path, error)
