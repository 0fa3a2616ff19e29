"""Manifests that this process has read before, and need not read again. No torch."""

from __future__ import annotations

from collections.abc import Collection, Hashable

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, Manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, source_of

__all__ = ["KnownManifests"]


class KnownManifests:
    """What manifests say, read again only if the file is another one or was written to.

    A committed manifest never changes. Should somebody replace or edit it all the same, its file has another
    inode, size or time of change, and what was read before does not count any more. To look at a file costs
    a thirtieth of reading, parsing and checking it.
    """

    def __init__(self) -> None:
        self._known: dict[Place, tuple[Hashable, Manifest]] = {}

    def read(self, place: Place) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            DamagedCheckpointError: as for `read_manifest`.
        """
        state = source_of(place).state_of(MANIFEST_NAME)  # before it is read: a write while we read is seen
        known = self._known.get(place)
        if known is not None and known[0] == state:
            return known[1]
        manifest = read_manifest(place)
        if state is not None:
            self._known[place] = state, manifest
        return manifest

    def keep(self, places: Collection[Place]) -> None:
        """Forget the manifests of all other places."""
        self._known = {place: known for place, known in self._known.items() if place in places}
