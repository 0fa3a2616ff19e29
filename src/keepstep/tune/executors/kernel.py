"""What Linux offers to keep processes together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Collection
from typing import Final

__all__ = [
    "adopt_orphans",
    "children",
    "die_with_parent",
    "end_orphans",
    "kill_group",
    "signal_name",
    "why_not_to_fork",
]

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_PATIENCE_S: Final = 2.0


def _prctl(option: int, argument: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)


def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Get a signal when the parent dies; die at once if it is gone already.

    Args:
        parent: its process id.
        number: the signal.
    """
    _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_name(number: int) -> str:
    """A signal's name, if it has one."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def kill_group(leader: int) -> None:
    """Kill the processes of a group, and a leader that is about to make it."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(leader, signal.SIGKILL)


def end_orphans(known: Collection[int]) -> None:
    """Kill and reap every child that isn't known, and what they leave behind."""
    end = time.monotonic() + _PATIENCE_S
    while (strangers := [child for child in children() if child not in known]) and time.monotonic() < end:
        for child in strangers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        for child in strangers:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < end:
                    time.sleep(0.001)


def children() -> list[int]:
    """Process ids of the children of the main thread."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []


def why_not_to_fork() -> str | None:
    """Why copies of this process would not work; None: they would."""
    if threading.active_count() > 1:
        names = ", ".join(
            thread.name for thread in threading.enumerate() if thread is not threading.main_thread()
        )
        return f"it has other threads: {names}"
    with contextlib.suppress(OSError):
        if len(os.listdir("/proc/self/task")) > 1:
            return "a library in it has started threads"
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{descriptor}").startswith("/dev/nvidia-uvm"):
                    return "it has initialized CUDA"
    return None
