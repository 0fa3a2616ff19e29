"""Functions, classes and configurations on their way to a process; the only module that uses cloudpickle.

Bytes go from the driver to processes that it started, over memory and sockets that nobody else can write to;
they are never written to a disk, and the driver never reads any.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from typing import Any

import cloudpickle

from keepstep.errors import UsageError

__all__ = ["dumps", "loads", "receive_from", "ship"]


def dumps(value: Any, what: str) -> bytes:
    """Bytes that `loads` makes the value of again, in another process.

    Args:
        value: anything; functions and classes of a script or notebook travel whole, others by name.
        what: what it is, for messages.

    Raises:
        UsageError: it holds something that can't travel, such as a lock or an open file.
    """
    buffer = io.BytesIO()
    _dump(value, buffer, what)
    return buffer.getvalue()


def _dump(value: Any, file: Any, what: str) -> None:
    try:
        cloudpickle.dump(value, file)
    except Exception as error:
        raise UsageError(
            f"{what} can't be sent to another process: {type(error).__name__}: {error}. Locks, open files, "
            "generators and connections can't travel: make them inside the function (or in setup()), or hand "
            "over what they can be made from"
        ) from error


def loads(data: bytes) -> Any:
    """Undo `dumps`."""
    return pickle.loads(data)  # noqa: S301 - from the driver


def ship(value: Any, what: str) -> int:
    """The same in memory that another process can read; returns its file descriptor.

    Raises:
        UsageError: as `dumps`.
    """
    descriptor = os.memfd_create("keepstep-trainable")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            _dump(value, file, what)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def receive_from(descriptor: int) -> Any:
    """What was shipped."""
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as shipped:
        return pickle.loads(shipped)  # noqa: S301 - from the driver
