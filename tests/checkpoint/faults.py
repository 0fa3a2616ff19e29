"""A fake of `Files` that fails, or "kills" the process, at any single operation.

Killing: the n-th operation raises `Killed` (a BaseException, as nothing catches a SIGKILL) and every
operation after it is refused, so that no clean-up of a process that still happens to run reaches the disk.
With `power_cut`, what was not made durable by then is lost: unsynced names are undone, unsynced bytes are
overwritten with garbage.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from keepstep.checkpoint.place import local
from keepstep.files import LocalFiles, SegmentFile
from keepstep.locks import DirectoryLock


class Killed(BaseException):
    """The process is gone from here on."""


class FaultyFiles:
    """Real files whose operation number `at` (from 0) fails.

    Args:
        at: which operation; None for none.
        error: what it raises; None kills the process instead.
        torn: a write that fails writes its first half before it does.
        power_cut: on a kill, lose what was not durable.
        exchange: whether directories can be swapped.
        graveyard: where removed trees wait, so that a power cut can bring them back.
    """

    def __init__(
        self,
        *,
        at: int | None = None,
        error: OSError | None = None,
        torn: bool = True,
        power_cut: bool = False,
        exchange: bool = True,
        graveyard: Path | None = None,
    ) -> None:
        self.at = at
        self.error = error
        self.torn = torn
        self.power_cut = power_cut
        self.can_exchange = exchange
        self.graveyard = graveyard
        self.log: list[str] = []
        self.dead = False
        self.failed = False
        self._real = LocalFiles()
        self._lock = threading.RLock()
        self._undo: list[_Change] = []
        self._volatile: dict[Path, int] = {}

    # ---------------------------------------------------------------------------------- the fault

    @contextlib.contextmanager
    def _operation(self, name: str, path: Path, half: Callable[[], None] | None = None) -> Iterator[None]:
        with self._lock:
            if self.dead:
                raise Killed
            number = len(self.log)
            self.log.append(f"{name} {path.name}")
            if number != self.at:
                yield
                return
            self.failed = True
            if half is not None and self.torn:
                half()
            if self.error is not None:
                raise self.error
            self.dead = True
            if self.power_cut:
                self._lose_what_is_not_durable()
            raise Killed

    def _lose_what_is_not_durable(self) -> None:
        for path, size in self._volatile.items():
            with contextlib.suppress(FileNotFoundError):
                path.write_bytes(b"\xa5" * (size // 2))
        while self._undo:
            change = self._undo.pop()
            with contextlib.suppress(OSError):
                change.undo(*change.paths)
            if change.moves:
                for earlier in self._undo:
                    earlier.follow(*reversed(change.paths[:2]), both_ways=change.swaps)

    def _changed(
        self, undo: Callable[..., object], *paths: Path, moves: bool = False, swaps: bool = False
    ) -> None:
        """Note a change of names; the names that it is about may be moved with their directory later."""
        if self.power_cut:
            for earlier in self._undo if moves else ():
                earlier.follow(*paths[:2], both_ways=swaps)
            self._undo.append(_Change(undo, list(paths), moves, swaps))

    def _moved(self, source: Path, target: Path) -> None:
        for path in [p for p in self._volatile if p.is_relative_to(source)]:
            self._volatile[target / path.relative_to(source)] = self._volatile.pop(path)

    # --------------------------------------------------------------------------------- operations

    def make_unfinished(self, path: Path) -> None:
        with self._operation("make_unfinished", path):
            self._real.make_unfinished(path)
            self._changed(shutil.rmtree, path)

    def make_directory(self, path: Path) -> None:
        if path.is_dir():
            return
        self.make_directory(path.parent)
        with self._operation("make_directory", path):
            path.mkdir(exist_ok=True)
            self._changed(shutil.rmtree, path)
        self.sync_directory(path.parent)

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        with self._operation("create_segment", path, half=path.touch):
            self._volatile[path] = size_bytes
            self._changed(Path.unlink, path)
            real = self._real.create_segment(path, size_bytes, durable=durable)
            return _FaultySegment(self, path, real, durable=durable)

    def write_file(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        with self._operation("write_file", path, half=lambda: _write(path, data[: len(data) // 2])):
            if not durable:
                self._volatile[path] = len(data)
            self._real.write_file(path, data, durable=durable)
            self._changed(Path.unlink, path)

    def make_file(self, path: Path, write: Callable[[Path], object]) -> None:
        def half() -> None:
            write(path)
            _write(path, path.read_bytes()[: path.stat().st_size // 2])

        with self._operation("make_file", path, half=half):
            self._real.make_file(path, write)
            self._changed(Path.unlink, path)

    def sync_directory(self, path: Path) -> None:
        with self._operation("sync_directory", path):
            self._real.sync_directory(path)
            self._undo = [change for change in self._undo if all(path != p.parent for p in change.paths)]

    def sync(self, directory: Path, names: Sequence[str]) -> None:
        """What the disk is handed at once it may take in any order; this object takes one of them."""
        paths = [directory, *(directory / name for name in names)]
        random.Random(self.at).shuffle(paths)
        for path in paths:
            if path.is_dir():
                self.sync_directory(path)
            else:
                with self._operation("sync", path):
                    self._real.sync(path.parent, [path.name])
                    self._volatile.pop(path, None)

    def rename(self, source: Path, target: Path) -> None:
        with self._operation("rename", source):
            replaced = target.read_bytes() if self.power_cut and target.is_file() else None
            self._real.rename(source, target)
            self._moved(source, target)
            self._changed(lambda s, t: _rename_back(s, t, replaced), source, target, moves=True)

    def exchange(self, first: Path, second: Path) -> bool:
        if not self.can_exchange:
            return False
        with self._operation("exchange", first):
            done = self._real.exchange(first, second)
            self._changed(self._real.exchange, first, second, moves=True, swaps=True)
            return done

    def link(self, source: Path, target: Path) -> None:
        with self._operation("link", target):
            self._real.link(source, target)
            self._changed(Path.unlink, target)

    def remove_file(self, path: Path) -> None:
        with self._operation("remove_file", path):
            if self.graveyard is None or not self.power_cut:
                self._real.remove_file(path)
            else:
                self._bury(path)

    def remove_directory(self, path: Path) -> None:
        with self._operation("remove_directory", path):
            self._real.remove_directory(path)
            self._changed(Path.mkdir, path)

    def remove_tree(self, path: Path) -> None:
        with self._operation("remove_tree", path, half=lambda: _remove_half(path)):
            if self.graveyard is None or not self.power_cut:
                self._real.remove_tree(path)
            else:
                self._bury(path)

    def _bury(self, path: Path) -> None:
        assert self.graveyard is not None
        self.graveyard.mkdir(exist_ok=True)
        grave = self.graveyard / str(len(list(self.graveyard.iterdir())))
        path.rename(grave)
        self._changed(grave.rename, path)


@dataclass
class _Change:
    """A change of names that is not durable until their directories are synced."""

    undo: Callable[..., object]
    paths: list[Path]
    moves: bool
    swaps: bool

    def follow(self, source: Path, target: Path, *, both_ways: bool) -> None:
        """What lay in a directory that was moved lies elsewhere now."""
        for index, path in enumerate(self.paths):
            if path.is_relative_to(source):
                self.paths[index] = target / path.relative_to(source)
            elif both_ways and path.is_relative_to(target):
                self.paths[index] = source / path.relative_to(target)


class _FaultySegment:
    def __init__(self, files: FaultyFiles, path: Path, real: SegmentFile, *, durable: bool) -> None:
        self._files = files
        self._path = path
        self._real = real
        self._durable = durable

    def write_at(self, data: memoryview, offset: int) -> None:
        half = len(data) // 2 // 4096 * 4096
        with self._files._operation(
            "write_at", self._path, half=lambda: self._real.write_at(data[:half], offset) if half else None
        ):
            self._real.write_at(data, offset)

    def stop(self) -> None:
        self._real.stop()

    def finish(self) -> None:
        with self._files._operation("finish", self._path):
            self._real.finish()
            if self._durable:
                self._files._volatile.pop(self._path, None)

    def abandon(self) -> None:
        self._real.abandon()


def _rename_back(source: Path, target: Path, replaced: bytes | None) -> None:
    target.rename(source)
    if replaced is not None:
        target.write_bytes(replaced)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _remove_half(path: Path) -> None:
    for entry in sorted(path.iterdir())[::2]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


class Locks:
    """Directory locks go with their process; a kill that is only played has to let go of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[DirectoryLock] = []
        held = self.held

        class Recorded(DirectoryLock):
            def __init__(self, path: Path, **how: bool) -> None:
                super().__init__(path, **how)
                held.append(self)

        monkeypatch.setattr(local, "DirectoryLock", Recorded)

    def die(self) -> None:
        for lock in self.held:
            lock.release()
        self.held.clear()


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
IO_ERROR = OSError(errno.EIO, os.strerror(errno.EIO))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))
NO_PERMISSION = OSError(errno.EACCES, os.strerror(errno.EACCES))
