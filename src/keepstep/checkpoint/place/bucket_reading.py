"""The files of one checkpoint in a bucket, read in ranges."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from keepstep.checkpoint.format.manifest import CHECKPOINT_NAME, MANIFEST_NAME, FileEntry
from keepstep.checkpoint.format.names import is_handed_over
from keepstep.errors import FileSizeError, ManifestError, MissingFileError

__all__ = [
    "DAMAGED",
    "BucketSource",
    "FoundLike",
    "Listing",
    "ObjectsLike",
    "as_key",
    "as_name",
    "is_old",
    "missing",
]

DAMAGED: Final = ".keepstep/damaged"
"""Below it lie the manifests of checkpoints that were set aside; their files stay where they are."""

_ODD: Final = re.compile(rb"[^A-Za-z0-9/._+@-]")
_ESCAPED: Final = re.compile(rb"=([0-9A-F]{2})")

_LONG_DEAD: Final = timedelta(days=1)
_FRESH_S: Final = 5.0
"""For so long a listing counts as what is there now."""


def as_key(name: str) -> str:
    """What the name of a file is within a key: servers and clients differ in what they do to odd characters.

    Of what was handed over, each byte but letters, digits, `/` and `._+@-` becomes `=` and two hex digits.
    """
    if not is_handed_over(name):
        return name
    return _ODD.sub(lambda odd: b"=%02X" % odd[0][0], name.encode()).decode()


def as_name(key: str) -> str:
    """The name that became `key`."""
    if not is_handed_over(key):
        return key
    return _ESCAPED.sub(lambda hex_: bytes([int(hex_[1], 16)]), key.encode()).decode(errors="replace")


class FoundLike(Protocol):
    """An object in a listing."""

    @property
    def key(self) -> str:
        """Relative to the store."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def modified(self) -> datetime:
        """By the server's clock."""

    @property
    def tag(self) -> str:
        """Changes with its content."""


class ObjectsLike(Protocol):
    """Objects below one prefix (`objects.py`). Missing ones are FileNotFoundErrors."""

    @property
    def address(self) -> str:
        """Where they are, for messages."""

    def list(self, prefix: str = "", *, after: str | None = None) -> Iterator[FoundLike]:
        """Every object below a prefix, in no order."""

    def size(self, key: str) -> int | None:
        """Size of an object, None if there is none."""

    def get(self, key: str) -> bytes:
        """A small object, whole."""

    def read_into(self, key: str, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` of an object; return how many bytes there were."""

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write a small object in one request."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a small object if there is none of that key; False if there is."""

    def refuses_create(self, key: str) -> Exception:
        """The error of a server that can't do that."""

    def upload(self, key: str, parts: Iterable[memoryview]) -> None:
        """Write a large object in parts."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects that may be gone."""


@dataclass(slots=True)
class Listing:
    """What was there at a moment: size and tag by key."""

    found: Mapping[str, FoundLike]
    at_s: float = field(default_factory=time.monotonic)

    @property
    def is_fresh(self) -> bool:
        """Whether it is young enough to speak of now."""
        return time.monotonic() - self.at_s < _FRESH_S


class _RangeFile:
    is_plain = True

    def __init__(self, objects: ObjectsLike, key: str, size_bytes: int) -> None:
        self._objects = objects
        self._key = key
        self.size_bytes = size_bytes

    def read_into(self, view: memoryview, offset: int) -> int:
        return self._objects.read_into(self._key, view, offset) if len(view) else 0

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        return bytes(memoryview(data)[: self.read_into(memoryview(data), offset)])

    def map(self) -> None:
        return None

    def forget_cached(self) -> None:
        pass

    def close(self) -> None:
        pass


class BucketSource:
    """A checkpoint in a bucket.

    Args:
        objects: of the store.
        prefix: of the checkpoint, as "checkpoint_12".
        listing: what was there when the store was looked at.
        manifests: contents of manifests that were read before, by key and tag; shared with the store.
    """

    read_threads = 8

    def __init__(
        self,
        objects: ObjectsLike,
        prefix: str,
        listing: Listing | None = None,
        manifests: dict[tuple[str, str], bytes] | None = None,
    ) -> None:
        self.prefix = prefix
        self._objects = objects
        self._listing = listing
        self._manifests = manifests if manifests is not None else {}

    def __str__(self) -> str:
        return f"{self._objects.address}/{self.prefix}"

    def __repr__(self) -> str:
        return f"BucketSource({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketSource) and str(other) == str(self)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        return self.prefix.rpartition("/")[2]

    @property
    def place(self) -> BucketSource:
        return self

    def exists(self) -> bool:
        return bool(self._objects.size(f"{self.prefix}/{MANIFEST_NAME}"))

    def has_manifest(self) -> bool:
        return self.exists()

    def read_small(self, name: str, limit_bytes: int, within: str | None = None) -> bytes:
        key = f"{self._home(within)}/{name}"
        seen = self._listing.found.get(key) if self._listing is not None and name == MANIFEST_NAME else None
        kept = self._manifests.get((key, seen.tag)) if seen is not None and seen.tag else None
        if kept is not None:
            return kept
        size = seen.bytes if seen is not None else self._objects.size(key)
        if size is None:
            raise ManifestError(self, f"{name} is missing; this is not a whole checkpoint")
        if size > limit_bytes:
            raise ManifestError(self, f"{name} is larger than {limit_bytes} bytes")
        try:
            data = self._objects.get(key)
        except FileNotFoundError:
            raise ManifestError(self, f"{name} is missing; this is not a whole checkpoint") from None
        if not data and name == MANIFEST_NAME:
            raise ManifestError(self, f"{name} is empty: this attempt was given up, it is no checkpoint")
        if seen is not None and seen.tag:
            self._manifests[key, seen.tag] = data
        return data

    def state_of(self, name: str) -> Hashable | None:
        seen = self._listing.found.get(f"{self.prefix}/{name}") if self._listing is not None else None
        return seen.tag if seen is not None and seen.tag else None

    def check_files(self, files: Mapping[str, FileEntry]) -> None:
        sizes = self._sizes({self._home(entry.within) for entry in files.values()})
        for name, entry in files.items():
            size = sizes.get(self.key_of(name, entry))
            where = f" of {entry.within}" if entry.within else ""
            if size is None:
                raise MissingFileError(self, f"the file {name}{where} ({entry.bytes} bytes) is missing")
            if size != entry.bytes:
                raise FileSizeError(
                    self,
                    f"{name}{where} has {size} bytes, but {entry.bytes} were committed: "
                    "it was cut or extended",
                )

    def _sizes(self, homes: set[str]) -> dict[str, int]:
        if self._listing is not None and self._listing.is_fresh:
            return {key: found.bytes for key, found in self._listing.found.items()}
        return {found.key: found.bytes for home in homes for found in self._objects.list(home)}

    def _home(self, within: str | None) -> str:
        """The prefix of a file: this checkpoint's, an attempt's, or an older one's of the same store."""
        if within is None:
            return self.prefix
        return within if CHECKPOINT_NAME.match(within) else f"{self.prefix}/{within}"

    def open(self, name: str, entry: FileEntry) -> _RangeFile:
        return _RangeFile(self._objects, self.key_of(name, entry), entry.bytes)

    def held(self, files: Mapping[str, FileEntry]) -> dict[Hashable, int]:
        return {self.key_of(name, entry): entry.bytes for name, entry in files.items()}

    def key_of(self, name: str, entry: FileEntry) -> str:
        """The key of a file's object."""
        return f"{self._home(entry.within)}/{as_key(name)}"


def is_old(files: Mapping[str, FoundLike]) -> bool:
    """Whether nobody has touched any of these objects for a day: nobody can be at them."""
    now = datetime.now(UTC)
    return all(now - found.modified > _LONG_DEAD for found in files.values())


def missing(key: str) -> FileNotFoundError:
    """The error for an object that is not there."""
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
