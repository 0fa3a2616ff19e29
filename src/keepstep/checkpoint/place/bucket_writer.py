"""Which process writes to a bucket of checkpoints."""

from __future__ import annotations

import logging
from typing import Final

from keepstep.checkpoint.place.backend import INTERNAL_NAME
from keepstep.checkpoint.place.bucket_reading import ObjectsLike
from keepstep.checkpoint.place.claimant import Claimant, parse_claim, this_process
from keepstep.errors import StoreBusyError

__all__ = ["BucketWriter"]

_WRITER: Final = f"{INTERNAL_NAME}/writer.json"
_PROBE: Final = f"{INTERNAL_NAME}/create-only"

log = logging.getLogger(__name__)


class BucketWriter:
    """The object that says who writes.

    Args:
        objects: below the prefix.
    """

    def __init__(self, objects: ObjectsLike) -> None:
        self._objects = objects

    def claim(self) -> None:
        """Become the one who writes.

        Raises:
            StoreBusyError: a living process of this machine does.
            BucketError: the server knows no create-only puts, by which checkpoints are committed.
        """
        self._check_create_only()
        holder = self._holder()
        if holder is not None and holder.lives_here and not holder.is_here:
            raise StoreBusyError(
                f"{self._objects.address} is being written to by {holder}. One process at a time may write "
                "to a store: stop that one, or give this run another address"
            )
        if holder is not None and not holder.is_here and not holder.is_dead:
            log.warning(
                "taking %s over from %s; should that one still run, it can't commit any more",
                self._objects.address,
                holder,
            )
        self._objects.put(_WRITER, this_process().dump())

    def _check_create_only(self) -> None:
        """A server that ignores the condition would let two writers overwrite each other's commits."""
        if self._objects.create(_PROBE, b"keepstep\n") and self._objects.create(_PROBE, b"keepstep\n"):
            raise self._objects.refuses_create(_PROBE)
        if self._objects.size(_PROBE) is None:
            raise self._objects.refuses_create(_PROBE)

    def _holder(self) -> Claimant | None:
        try:
            return parse_claim(self._objects.get(_WRITER))[0]
        except FileNotFoundError:
            return None

    def is_me(self) -> bool:
        """Whether nobody has taken over."""
        holder = self._holder()
        return holder is None or holder.is_here

    def check(self) -> None:
        """Who was taken over from does not know what the other one links.

        Raises:
            StoreBusyError: somebody has taken over.
        """
        if not self.is_me():
            raise StoreBusyError(
                f"another process writes to {self._objects.address} meanwhile; nothing was changed. One "
                "process at a time may write to a store: stop that one, or give this run another address"
            )
