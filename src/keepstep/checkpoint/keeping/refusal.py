"""Checkpoints that can't be read, though nothing is known to be wrong with their bytes. No torch."""

from __future__ import annotations

import errno

from keepstep.checkpoint.format.source import Place
from keepstep.errors import SchemaVersionError, StoreError

__all__ = ["is_refusal", "refused"]

_REFUSALS = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


def is_refusal(error: BaseException) -> bool:
    """Whether what is behind an error says nothing about the bytes.

    The system refuses to read them, or a newer keepstep wrote them.
    """
    cause: BaseException | None = error
    while cause is not None:
        refused = isinstance(cause, OSError) and cause.errno in _REFUSALS
        if refused or isinstance(cause, SchemaVersionError):
            return True
        cause = cause.__cause__
    return False


def refused(place: Place | str, reason: str) -> StoreError:
    """What to raise of one that may well be whole, where an older one would be taken in its place."""
    return StoreError(
        f"{place} can't be read: {reason}. It may well be whole, so it was not set aside and no older "
        "checkpoint was taken. Give this process what it lacks and start it again"
    )
