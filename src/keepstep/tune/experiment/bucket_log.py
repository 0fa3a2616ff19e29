"""A journal in a bucket: each append is an object of its own, which no other process can put there too."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from keepstep.checkpoint.place.bucket_writing import explained_bucket
from keepstep.checkpoint.place.registry import open_objects
from keepstep.errors import ExperimentBusyError, ExperimentNotFoundError

__all__ = ["BucketLog"]

_PREFIX: Final = "journal/"
_READERS: Final = 16


class BucketLog:
    """A `Log` below the prefix `journal/` of an experiment.

    Args:
        address: of the experiment.
        storage_options: as `keepstep.Store` takes them.
    """

    def __init__(self, address: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self._address = address.rstrip("/")
        self._objects = open_objects(self._address, storage_options)
        self._next: int | None = None

    def __str__(self) -> str:
        return f"{self._address}/{_PREFIX.rstrip('/')}"

    def read(self) -> bytes:
        keys = self._keys()
        if not keys:
            raise ExperimentNotFoundError(
                f"{self._address} holds no experiment (there is nothing below {_PREFIX}). Name the "
                f"address of an "
                "experiment: <storage_path>/<name>"
            )
        with explained_bucket(self._address, "reading"), ThreadPoolExecutor(_READERS) as readers:
            return b"".join(readers.map(self._objects.get, keys))

    def _keys(self) -> list[str]:
        with explained_bucket(self._address, "reading"):
            return sorted(found.key for found in self._objects.list(_PREFIX))

    def append(self, data: bytes) -> None:
        if self._next is None:
            self._next = len(self._keys())
        with explained_bucket(self._address, "appending to the journal of"):
            created = self._objects.create(f"{_PREFIX}{self._next:010d}.jsonl", data)
        if not created:
            raise ExperimentBusyError(
                f"{self._address} is being run by another process, which has written to its journal since "
                f"this one "
                "looked. Stop that one, or give this one another RunConfig.name"
            )
        self._next += 1

    def cut(self, size: int) -> None:
        """An object is there whole or not at all: nothing is ever torn."""

    def close(self) -> None:
        """It holds nothing."""
