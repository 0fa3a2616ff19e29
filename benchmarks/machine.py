"""Bring the machine into the same condition before every timed run.

The disk: nobody pays for the dirty pages of another. Free memory: on many virtual machines the host takes
free pages back after a second or two, and a process that then takes memory (for the page cache as well)
pays for getting them again, several times what the copy itself costs. Whoever runs right after something
large was freed is spared. So before each run free memory is either warmed, or left alone until it is cold.
"""

from __future__ import annotations

import mmap
import os
import time

import numpy as np

__all__ = ["cool", "warm"]

_MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", None)


def warm(size_bytes: int) -> None:
    """Quiet the disk and see that the next `size_bytes` of fresh memory come without the host's help."""
    memory = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _MADV_HUGEPAGE is not None:
        memory.madvise(_MADV_HUGEPAGE)
    np.frombuffer(memory, dtype=np.uint8)[:: mmap.PAGESIZE] = 1
    os.sync()  # with the memory held: what the run before freed is still warm, and stays so


def cool(seconds: float) -> None:
    """Quiet the disk and wait: the host takes free memory back, if it does so at all."""
    os.sync()
    time.sleep(seconds)
