"""A rank ends when its launcher does, even one that was killed by SIGKILL and could tell nobody.

By Linux's own means; elsewhere ranks are started as they are. As a script (`leash.py PID PROGRAM ...`) it
becomes the program, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

__all__ = ["end_with", "leashed"]

_PR_SET_PDEATHSIG: Final = 1


def leashed(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command that runs another one, for as long as this process lives."""
    if sys.platform != "linux":
        return command
    return (sys.executable, "-I", "-S", __file__, str(os.getpid()), *command)


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends.

    Args:
        parent: its process id.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before that
        os.kill(os.getpid(), signal.SIGKILL)


def _main(parent: int, command: list[str]) -> None:
    end_with(parent)
    try:
        os.execvp(command[0], command)  # noqa: S606 (the program that was asked for)
    except OSError as error:
        words = f"{command[0]} cannot be started: {error.strerror}. Is it the program you meant?"
        sys.stderr.write(f"keepstep launch: {words}\n")
        sys.exit(2)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
