"""Objects that saves of this process link, and those that its deletions are about to take: never both."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterator

__all__ = ["KeysInUse", "keys_in_use"]


class KeysInUse:
    """What saves and deletions at one address, in this process, have to know of each other."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a handler of a signal may save in the middle of this
        self._begun: set[str] = set()
        self._linked: Counter[str] = Counter()
        self._doomed: Counter[str] = Counter()

    def begin(self, name: str) -> bool:
        """A save under a name that the user chose begins; False if one of this process is at it."""
        with self._lock:
            if name in self._begun:
                return False
            self._begun.add(name)
            return True

    def end(self, name: str) -> None:
        """That save is over."""
        with self._lock:
            self._begun.discard(name)

    def link(self, key: str) -> bool:
        """Keep an object from being deleted until `unlink`; False if a deletion was faster."""
        with self._lock:
            if self._doomed[key]:
                return False
            self._linked[key] += 1
            return True

    def unlink(self, keys: Collection[str]) -> None:
        """A save that linked these is over."""
        with self._lock:
            self._linked -= Counter(keys)

    @contextlib.contextmanager
    def deleting(self, keys: Collection[str]) -> Iterator[set[str]]:
        """Nobody links these meanwhile; yields those that no save links.

        Enter it before looking which manifests there are: a save that linked an object before is told by its
        link, and one that comes later finds it taken.
        """
        with self._lock:
            marked = set(keys)
            self._doomed.update(marked)  # first, for a handler that saves right now
            free = {key for key in marked if not self._linked[key]}
            self._doomed -= Counter(marked - free)
        try:
            yield free
        finally:
            with self._lock:
                self._doomed -= Counter(free)


_places: weakref.WeakValueDictionary[str, KeysInUse] = weakref.WeakValueDictionary()
_guard = threading.RLock()


def keys_in_use(address: str) -> KeysInUse:
    """Of a place, for all who write there in this process."""
    with _guard:
        found = _places.get(address)
        if found is None:
            found = _places[address] = KeysInUse()
        return found
