"""A journal in a bucket: each append is an object of its own, which no other process can put there too.

So that a long journal is read in few requests, every so many objects are copied into one. The objects stay:
as long as a number is taken, a process that was shut out can't append under it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

from keepstep.checkpoint.place.bucket_writing import explained_bucket
from keepstep.checkpoint.place.registry import open_objects
from keepstep.errors import ExperimentBusyError, ExperimentNotFoundError, JournalError, KeepstepError

__all__ = ["BucketLog"]

_PREFIX: Final = "journal/"
_MERGED: Final = "journal-merged/"
_READERS: Final = 16
_MERGE_EVERY: Final = 1000
_KEY: Final = re.compile(r"journal/(\d{10})\.jsonl|journal-merged/(\d{10})-(\d{10})\.jsonl")


class _Piece(NamedTuple):
    """An object: the appends from `begin` up to, not with, `end`."""

    begin: int
    end: int
    key: str


class BucketLog:
    """A `Log` below the prefix `journal/` of an experiment.

    Args:
        address: of the experiment.
        storage_options: as `keepstep.Store` takes them.
        merge_every: how many appends are copied into one object.
    """

    def __init__(
        self,
        address: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        merge_every: int = _MERGE_EVERY,
    ) -> None:
        self._address = address.rstrip("/")
        self._objects = open_objects(self._address, storage_options)
        self._merge_every = merge_every
        self._next: int | None = None
        self._kept: dict[str, bytes] = {}
        self._unmerged: list[bytes] = []

    def __str__(self) -> str:
        return f"{self._address}/{_PREFIX.rstrip('/')}"

    def read(self) -> bytes:
        """All of it; appends go on behind what was read. What was read before, and never changes, is kept.

        Raises:
            ExperimentNotFoundError: there is none.
            JournalError: an object is missing.
        """
        with explained_bucket(self._address, "reading"):
            pieces = self._pieces()
            if not pieces:
                raise ExperimentNotFoundError(
                    f"{self._address} holds no experiment (there is nothing below {_PREFIX}). Name the "
                    "address of an experiment: <storage_path>/<name>"
                )
            with ThreadPoolExecutor(_READERS) as readers:
                found = list(readers.map(self._get, (piece.key for piece in pieces)))
            self._kept = {piece.key: data for piece, data in zip(pieces, found, strict=True)}
        self._next = pieces[-1].end
        self._unmerged = [
            data for data, piece in zip(found, pieces, strict=True) if not piece.key.startswith(_MERGED)
        ]
        return b"".join(found)

    def _get(self, key: str) -> bytes:
        kept = self._kept.get(key)
        return kept if kept is not None else self._objects.get(key)

    def _pieces(self) -> list[_Piece]:
        """The objects to read, in order: what is merged, and the single ones behind that."""
        chain: list[_Piece] = []
        end = 0
        for piece in sorted(_parsed(found.key for found in self._objects.list(_MERGED)), key=lambda p: p.end):
            if piece.begin == end:
                chain.append(piece)
                end = piece.end
        last_merged = f"{_PREFIX}{end - 1:010d}.jsonl" if end else None
        for piece in sorted(_parsed(found.key for found in self._objects.list(_PREFIX, after=last_merged))):
            if piece.begin != end:
                raise JournalError(
                    f"{self._address}/{_PREFIX}{end:010d}.jsonl is missing, and later ones are there: "
                    "objects of the journal were deleted. Put a copy of it in its place"
                )
            chain.append(piece)
            end = piece.end
        return chain

    def append(self, data: bytes) -> None:
        if self._next is None:
            with contextlib.suppress(ExperimentNotFoundError):
                self.read()
        number = self._next or 0
        key = f"{_PREFIX}{number:010d}.jsonl"
        with explained_bucket(self._address, "appending to the journal of"):
            # Its own bytes: the request was made twice, as the answer to the first one was lost.
            appended = self._objects.create(key, data) or self._objects.get(key) == data
        if not appended:
            raise ExperimentBusyError(
                f"{self._address} is being run by another process, which has written to its journal since "
                "this one looked. Stop that one, or give this one another RunConfig.name"
            )
        self._next, self._kept = number + 1, {}
        self._unmerged.append(data)
        if len(self._unmerged) % self._merge_every == 0:
            self._merge()

    def _merge(self) -> None:
        """Copy the single objects into one; they hold the same, so it does not matter if that fails."""
        assert self._next is not None
        key = f"{_MERGED}{self._next - len(self._unmerged):010d}-{self._next - 1:010d}.jsonl"
        with contextlib.suppress(KeepstepError, OSError):
            self._objects.put(key, b"".join(self._unmerged))
            self._unmerged = []

    def cut(self, size: int) -> None:
        """An object is there whole or not at all: nothing is ever torn."""

    def close(self) -> None:
        """It holds nothing."""


def _parsed(keys: Iterable[str]) -> list[_Piece]:
    pieces = []
    for key in keys:
        if found := _KEY.fullmatch(key):
            single, begin, end = found.groups()
            pieces.append(_Piece(int(single or begin), int(single or end) + 1, key))
    return pieces
