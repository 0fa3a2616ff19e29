"""What the operating system refuses, in keepstep's errors."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from keepstep.errors import KeepstepError, NoSpaceError, StoreError, StoreReadOnlyError

__all__ = ["disk_errors"]


@contextlib.contextmanager
def disk_errors(path: Path, doing: str, *, left: str, room: str) -> Iterator[None]:
    """Turn what the disk refuses inside the block into keepstep's errors.

    Args:
        path: what is written to.
        doing: what is under way, as "saving".
        left: what is still there afterwards, a sentence without its full stop.
        room: what makes room, beside "free some space".

    Raises:
        NoSpaceError, StoreReadOnlyError, StoreError: with the path and the way out.
    """
    try:
        yield
    except KeepstepError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpaceError(
                f"no space for {doing} {path}: {reason}. {left}. Free some space, or {room}"
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise StoreReadOnlyError(
                error.errno,
                f"cannot write to {path}: {reason}. Change its permissions, or those above it, or choose "
                "another directory",
            ) from error
        raise StoreError(f"{doing} {path} failed: {reason}. {left}") from error
