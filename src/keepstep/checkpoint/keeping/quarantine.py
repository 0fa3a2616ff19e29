"""Damaged checkpoints are moved out of the way, never deleted: a person may want what is left of them."""

from __future__ import annotations

import errno

from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.keeping.catalog import Root, backend_of
from keepstep.errors import SchemaVersionError

__all__ = ["is_refusal", "set_aside"]

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


def set_aside(root: Root, place: Place) -> Place:
    """Move a checkpoint of a store into `.keepstep/damaged/`; its number is never used again.

    Returns:
        Where it lies now.

    Raises:
        OSError, StoreError: the disk refuses; it is where it was.
    """
    return backend_of(root).set_aside(place)
