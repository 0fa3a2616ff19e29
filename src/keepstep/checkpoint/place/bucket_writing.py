"""An unfinished checkpoint in a bucket, and the commit.

The commit is one create-only put of `manifest.json`. Nobody else can have taken that key for another content,
and an attempt that is given up takes it itself, with no bytes: then what is still under way can't commit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from keepstep.checkpoint.format.manifest import CHECKPOINT_NAME, MANIFEST_NAME, FileEntry, Manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.place.bucket_reading import BucketSource, ObjectsLike, as_key, missing
from keepstep.checkpoint.place.in_use import KeysInUse
from keepstep.errors import BucketError, DamagedCheckpointError, KeepstepError, StoreBusyError, StoreError
from keepstep.files import SegmentFile
from keepstep.outcome import LOOK_UP_S, Bell, Latch, Outcome

__all__ = ["CLAIM_NAME", "BucketWorkspace", "content_of", "explained_bucket"]

CLAIM_NAME: Final = "claim.json"
_PART_BYTES: Final = 8 << 20

log = logging.getLogger(__name__)


@contextlib.contextmanager
def explained_bucket(what: object, doing: str = "saving") -> Iterator[None]:
    """Turn what a bucket's objects raise into keepstep's errors."""
    try:
        yield
    except KeepstepError:
        raise
    except OSError as error:
        said = f"{error.filename} is gone" if isinstance(error, FileNotFoundError) else str(error)
        raise StoreError(f"{doing} {what} failed: {said}. Other checkpoints are whole") from error


def content_of(objects: ObjectsLike, key: str) -> bytes | None:
    """A small object, None if there is none."""
    try:
        return objects.get(key)
    except FileNotFoundError:
        return None


class _SmallSegment:
    """A segment of one block: a single put."""

    def __init__(self, objects: ObjectsLike, key: str, size_bytes: int) -> None:
        self._objects = objects
        self._key = key
        self._size_bytes = size_bytes

    def write_at(self, data: memoryview, offset: int) -> None:
        self._objects.put(self._key, bytes(data[: self._size_bytes]))

    def stop(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class _Abandoned(Exception):  # noqa: N818  (ends an upload from within; never seen outside)
    pass


class _LargeSegment:
    """A segment in parts, uploaded straight from the memory that `write_at` is given.

    obstore keeps a reference to each part until the server has it, and no longer; `write_at` waits for that:
    there is no second copy, and as many parts are under way as there are writers.
    """

    def __init__(self, objects: ObjectsLike, key: str, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._changed = Bell()
        self._waiting: dict[int, memoryview] = {}
        self._abandoned = False
        self._uploaded: Outcome[None] = Outcome()
        threading.Thread(
            target=lambda: self._uploaded.settle(lambda: objects.upload(key, self._parts())),
            name="keepstep-upload",
            daemon=True,
        ).start()

    def _parts(self) -> Iterator[memoryview]:
        position = 0
        while position < self._size_bytes:
            part = self._next_part(position)
            position += len(part)
            yield part
            del part

    def _next_part(self, position: int) -> memoryview:
        while True:
            with self._lock:
                if position in self._waiting:
                    return self._waiting.pop(position)
                changed = self._changed.next_ring
            if self._abandoned:
                raise _Abandoned
            changed.wait(LOOK_UP_S)

    def write_at(self, data: memoryview, offset: int) -> None:
        released = Latch()
        # A view of its own, no copy: it goes when obstore lets go of it.
        part = data[: self._size_bytes - offset]
        gone = weakref.ref(part, lambda _: released.open())
        with self._lock:
            self._waiting[offset] = part
            del part
            self._changed.ring()
        while gone() is not None and not self._uploaded.done():
            released.wait(LOOK_UP_S)
        if self._uploaded.done():
            self._uploaded.result()

    def finish(self) -> None:
        self._uploaded.result()

    def stop(self) -> None:
        with self._lock:
            self._abandoned = True
            self._changed.ring()

    def abandon(self) -> None:
        self.stop()
        self._uploaded.wait()


class BucketWorkspace:
    """A `HostWorkspace` under a reserved number.

    Args:
        objects: of the store.
        final: where the checkpoint will lie.
        is_writer: whether this process is still the one that writes; asked just before the commit.
        in_use: keeps deletions of this process from what is linked.
        keeps_parts: leave what was uploaded, and the number, for another attempt at the same checkpoint.
        attempt: the prefix of its own that it writes to, below `final`; None: beside the manifest.
    """

    def __init__(
        self,
        objects: ObjectsLike,
        final: BucketSource,
        *,
        is_writer: Callable[[], bool],
        in_use: KeysInUse,
        keeps_parts: bool = False,
        attempt: str | None = None,
    ) -> None:
        self.final = final
        self.within = attempt
        self.is_over = False
        self._objects = objects
        self._is_writer = is_writer
        self._in_use = in_use
        self._mine: set[str] = set()
        self._linked: list[str] = []
        self._written: set[str] = set()
        self._keeps_parts = keeps_parts
        self._read: dict[str, Manifest] = {}
        self._has_guests = False

    def check(self) -> None:
        """The number is this attempt's own."""

    def explained(self) -> contextlib.AbstractContextManager[None]:
        return explained_bucket(self.final)

    def open(self) -> None:
        """The claim made room for it."""

    @property
    def _home(self) -> str:
        """The prefix that it writes to."""
        return self.final.prefix if self.within is None else f"{self.final.prefix}/{self.within}"

    def _key(self, name: str) -> str:
        return f"{self._home}/{as_key(name)}"

    def make_directory(self, name: str) -> None:
        """Nothing: a bucket has no directories; the manifest names those that are empty."""

    def create_segment(self, name: str, size_bytes: int) -> SegmentFile:
        key = self._key(name)
        self._written.add(key)
        kind = _SmallSegment if size_bytes <= _PART_BYTES else _LargeSegment
        return kind(self._objects, key, size_bytes)

    def write_file(self, name: str, data: bytes) -> None:
        key = self._key(name)
        self._written.add(key)
        self._objects.put(key, data)

    def link(self, name: str, checkpoint: str, file: str, committed: FileEntry) -> str | None:
        if name != file:
            raise missing(f"{checkpoint}/{file}")  # an object has one name
        try:
            if checkpoint not in self._read:
                self._read[checkpoint] = read_manifest(BucketSource(self._objects, checkpoint))
            entry = self._read[checkpoint].files[file]
        except (DamagedCheckpointError, KeyError):
            raise missing(f"{checkpoint}/{file}") from None
        home = entry.within or checkpoint
        if not CHECKPOINT_NAME.match(home):
            raise missing(f"{checkpoint}/{file}")  # an attempt's: nothing beside its checkpoint can name it
        key = f"{home}/{as_key(file)}"
        same = (entry.digest, entry.bytes) == (committed.digest, committed.bytes)
        if not same or not self._in_use.link(key):
            raise missing(key)
        self._linked.append(key)
        if self._objects.size(key) != committed.bytes:
            raise missing(key)
        self._mine.add(key)
        return home

    def invitation(self) -> str:
        self._has_guests = True
        claim = self._objects.get(f"{self._home}/{CLAIM_NAME}")
        return json.dumps([self.final.prefix, self.within, claim.decode()])

    def take_over(self, files: Mapping[str, FileEntry]) -> None:
        """Keep what others have linked from deletions of this process, and see that it is still there."""
        linked = {self.final.key_of(name, entry): entry for name, entry in files.items() if entry.within}
        for key in linked:
            if not self._in_use.link(key):
                raise missing(key)
            self._linked.append(key)
        homes = {str(entry.within) for entry in linked.values()}
        sizes = {found.key: found.bytes for home in homes for found in self._objects.list(home)}
        for key, entry in linked.items():
            if sizes.get(key) != entry.bytes:
                raise missing(key)

    def has(self, name: str, size_bytes: int) -> bool:
        """Whether an earlier attempt at the same checkpoint has uploaded a file."""
        return self._objects.size(self._key(name)) == size_bytes

    def upload_file(self, name: str, path: Path, size_bytes: int, progress: Callable[[int], None]) -> None:
        """Upload a file of the disk; `progress` is called with the bytes read since the last call."""
        key = self._key(name)
        self._written.add(key)

        def parts() -> Iterator[memoryview]:
            with path.open("rb") as file:
                while part := file.read(_PART_BYTES):
                    yield memoryview(part)
                    progress(len(part))

        if size_bytes > _PART_BYTES:
            self._objects.upload(key, parts())
        else:
            self._objects.put(key, path.read_bytes())
            progress(size_bytes)

    def adopt(self, name: str, path: Path) -> None:
        self.upload_file(name, path, path.stat().st_size, lambda _: None)

    def commit(self, manifest: bytes) -> None:
        """Publish. Everything named by the manifest is durable already."""
        if not self._is_writer():
            raise self._taken_over()
        for key in self._mine:
            if self._objects.size(key) is None:
                raise missing(key)
        key = f"{self._home}/{MANIFEST_NAME}"
        try:
            created = self._objects.create(key, manifest)  # <- commit: after this line the checkpoint exists
        except BucketError:
            if not self._settle(key, manifest):
                raise
            created = True
        if (
            not created and content_of(self._objects, key) != manifest
        ):  # else: a repeated request met its own success
            if self._objects.size(key) is None:
                raise self._objects.refuses_create(key)
            raise self._taken_over()
        self._decided(manifest)
        self._end()

    def _decided(self, manifest: bytes) -> None:
        """Nothing: the manifest lies where readers look."""

    def _settle(self, key: str, manifest: bytes) -> bool:
        """After a put of unknown fate: True if it was applied; if not, it never will be.

        Raises:
            BucketError: the bucket does not answer, so that nobody knows. Nothing is removed then.
        """
        found = content_of(self._objects, key)
        if found is None and self._objects.create(key, b""):
            return False  # the key is taken: a late put is refused
        return (found if found is not None else content_of(self._objects, key)) == manifest

    def _taken_over(self) -> StoreBusyError:
        if self._has_guests and self._is_writer():
            return StoreBusyError(
                f"{self.final} was not committed: another rank gave this save up, since it failed there or "
                "waited for too long. Look at what the other ranks say; Ranks(timeout_s=...) gives more time"
            )
        return StoreBusyError(
            f"{self.final} was not committed: another process writes to this store meanwhile and has "
            "given up this attempt. One process at a time may write to a store: stop that one, or give this "
            "run another address"
        )

    def discard(self) -> None:
        """Remove what was written. Never raises: the error that led here is the one that counts."""
        if self.is_over:
            return
        key = f"{self._home}/{MANIFEST_NAME}"
        try:
            if self._keeps_parts:
                return
            if self._objects.create(key, b"") or not content_of(self._objects, key):
                self._objects.delete(self._left())
        except (StoreError, OSError) as error:
            log.warning(
                "%s was not cleared (%s); the next process that writes tries again", self.final, error
            )
        finally:
            self._end()

    def _left(self) -> set[str]:
        """What there is to remove; the host clears up behind guests that died."""
        if not self._has_guests:
            return self._written
        kept = {f"{self._home}/{name}" for name in (MANIFEST_NAME, CLAIM_NAME)}
        return {found.key for found in self._objects.list(self._home)} - kept

    def _end(self) -> None:
        self.is_over = True
        self._in_use.unlink(self._linked)
        self._linked = []
