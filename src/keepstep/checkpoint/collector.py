"""The garbage collector, kept from walking a plan while it is being made.

A plan of a hundred thousand tensors is a million objects without a cycle. Each of the collector's full passes
walks all that are there so far, which costs a third of a save and makes it grow faster than linearly.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

__all__ = ["collector_paused"]

_lock = threading.RLock()  # the handler of a signal may save as well
_pauses = 0
_was_enabled = False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause automatic collection for a block; several threads may, the last one out lets it go on."""
    global _pauses, _was_enabled  # noqa: PLW0603
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses = max(0, _pauses - 1)
            if _pauses == 0 and _was_enabled:
                gc.enable()


def _start_anew_after_fork() -> None:
    """Threads that paused it in the parent are not here to let it go on."""
    global _lock, _pauses  # noqa: PLW0603
    _lock = threading.RLock()
    if _pauses and _was_enabled:
        gc.enable()
    _pauses = 0


os.register_at_fork(after_in_child=_start_anew_after_fork)
