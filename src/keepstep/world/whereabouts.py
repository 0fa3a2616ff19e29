"""At which line of the user's program a thread is."""

from __future__ import annotations

import os
import sys
import sysconfig
import types
from pathlib import Path

__all__ = ["line_of_caller"]

_NOT_THE_USERS = (
    *(os.path.join(sysconfig.get_path(kind), "") for kind in ("stdlib", "purelib")),
    os.path.join(Path(__file__).parent.parent, ""),
    "<frozen",
)


def line_of_caller(frame: types.FrameType | None = None) -> str:
    """The innermost line of the user's program, as "train.py:31 in evaluate"; of this thread by default."""
    innermost = frame = sys._getframe(1) if frame is None else frame
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS):
            return _shown(frame)
        frame = frame.f_back
    return _shown(innermost)


def _shown(frame: types.FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
