"""One digest a tensor, however many threads hold parts of it."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import xxhash

from keepstep.outcome import LOOK_UP_S, Bell, Latch

__all__ = ["Aborted", "OrderedHasher"]


class Aborted(Exception):  # noqa: N818  (a signal between the threads of one save or load, never seen outside)
    """Another thread has failed; its error is the one that counts."""


class _Chain:
    def __init__(self) -> None:
        self.hasher = xxhash.xxh3_128()
        self.position = 0


class OrderedHasher:
    """xxh3_128 of byte ranges whose parts arrive from several threads.

    Parts must be handed out in order: then whoever holds the part before is at work on it, and waiting
    for it ends. Hashing itself runs without the lock and without the GIL.
    """

    def __init__(self, aborted: Latch) -> None:
        self._aborted = aborted
        self._chains: dict[Hashable, _Chain] = {}
        self._lock = threading.Lock()
        self._moved = Bell()

    def feed(self, key: Hashable, begin: int, size: int, data: memoryview) -> str | None:
        """Hash the part of `key` at `begin`; its digest once all `size` bytes were seen, else None.

        Raises:
            Aborted: the part before this one will never come.
        """
        end = begin + len(data)
        if begin == 0 and end == size:
            return xxhash.xxh3_128_hexdigest(data)
        chain = self._chain_at(key, begin)
        chain.hasher.update(data)
        with self._lock:
            chain.position = end
            self._moved.ring()
            if end < size:
                return None
            del self._chains[key]
        return chain.hasher.hexdigest()

    def _chain_at(self, key: Hashable, begin: int) -> _Chain:
        while True:
            with self._lock:
                chain = self._chains.setdefault(key, _Chain())
                if chain.position == begin:
                    return chain
                moved = self._moved.next_ring
            if self._aborted.is_open:
                raise Aborted
            moved.wait(LOOK_UP_S)

    def wake(self) -> None:
        """Let waiting threads see that they were aborted."""
        with self._lock:
            self._moved.ring()
