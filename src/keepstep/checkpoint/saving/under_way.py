"""Is the operation over that a thread was in the middle of?

Torch counts a write to a tensor when it is done, on the thread that does it. Until then no other thread can
know of it: the thread may have been stopped half-way, without the interpreter's lock, for as long as the
system likes. What another thread does see is where that thread's Python code stands. Once the code has gone
on to another instruction, or has returned, what it had called before is over, and counted.

Some of torch is Python itself, and counts only after it has run more of it (what `torch.compile` made, modes
that dispatch): there it is the code that called torch that has to go on.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Final

__all__ = ["UnderWay"]

_WITHIN_AN_OPERATION: Final = ("torch._", "torch.utils._python_dispatch")
"""Modules of torch's that run within an operation; what training loops run in (`torch.nn`, `torch.optim`,
`torch.multiprocessing`) leaves each operation behind before it goes on."""


class UnderWay:
    """What a thread is in the middle of, as of now.

    Only where its code stands is kept, no frame: a frame that was kept would keep what its variables hold.

    Args:
        thread: which.
    """

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        frame = self._frame()
        self._places = () if frame is None else _places(_caller_of_operation(frame))

    @property
    def is_over(self) -> bool:
        """Whether that is over for certain. A loop that comes back to the same call may go unnoticed."""
        frame = self._frame()
        if frame is None or not self._places or not self._thread.is_alive():
            return True
        return _places(frame)[-len(self._places) :] != self._places

    def _frame(self) -> FrameType | None:
        """The frame that the thread executes; None if it has ended."""
        ident = self._thread.ident
        return None if ident is None else sys._current_frames().get(ident)


def _places(frame: FrameType) -> tuple[tuple[int, int], ...]:
    """This frame and its callers, and where each stands; while they are executed they keep their address."""
    places = []
    caller: FrameType | None = frame
    while caller is not None:
        places.append((id(caller), caller.f_lasti))
        caller = caller.f_back
    return tuple(places)


def _caller_of_operation(top: FrameType) -> FrameType:
    """The frame whose call may be an operation of torch's: the outermost, if they lie within each other."""
    caller = top
    frame: FrameType | None = top
    while frame is not None:
        if _is_within_operation(frame):
            caller = frame.f_back or frame
        frame = frame.f_back
    return caller


def _is_within_operation(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__")
    of_torch = isinstance(module, str) and module.startswith(_WITHIN_AN_OPERATION)
    return of_torch or frame.f_code.co_name == "__torch_dispatch__"
