"""Peak memory of one operation in a fresh process, watched from outside.

The child builds the live state and waits; the parent samples what is resident and not backed by a file
(`RssAnon` and `RssShmem` of /proc/PID/status: staging memory may be shared) while the operation runs. Page
cache that a process maps does not count: the kernel takes it back at will.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.methods import methods, quiet_peers, remove
from benchmarks.settings import Size
from benchmarks.workload import TrainingState
from keepstep.checkpoint.store import Store

__all__ = ["Peak", "peak_of"]

_SAMPLE_EVERY_S = 0.001
_RESIDENT = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SMALL_BYTES = 128 << 10


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What an operation took.

    Attributes:
        above_bytes: highest resident memory while it ran, above that just before.
        state_bytes: of the live state.
    """

    above_bytes: int
    state_bytes: int


def peak_of(operation: str, method: str, path: Path, size: Size) -> Peak:
    """Run one operation ("save", "load", "background") of one method in a fresh process."""
    # Forked from a process that has imported everything and done nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, operation, method, path, size))
    child.start()
    theirs.close()
    try:
        state_bytes = ours.recv()
        assert child.pid is not None
        before = highest = _resident_bytes(child.pid)
        ours.send("go")
        while not ours.poll(_SAMPLE_EVERY_S):
            highest = max(highest, _resident_bytes(child.pid))
        ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"{operation} by {method} ended with status {child.exitcode}; see above") from None
    child.join()
    return Peak(above_bytes=highest - before, state_bytes=state_bytes)


def _resident_bytes(pid: int) -> int:
    return 1024 * sum(map(int, _RESIDENT.findall(Path(f"/proc/{pid}/status").read_bytes())))


# ----------------------------------------------------------------------------------- in the child


def _child(parent: Connection, operation: str, method: str, path: Path, size: Size) -> None:
    """Build the state, say its size, wait, run the operation, say so."""
    _return_freed_memory()
    quiet_peers()
    state = TrainingState(size)
    work = _operation(operation, method, path, state, size)
    gc.collect()
    parent.send(state.bytes)
    parent.recv()
    work()
    parent.send("done")
    if operation != "load":
        remove(path)


def _return_freed_memory() -> None:
    """Otherwise glibc keeps freed memory, and a peak hides in what was freed before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _SMALL_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _SMALL_BYTES)


def _operation(
    operation: str, method: str, path: Path, state: TrainingState, size: Size
) -> Callable[[], object]:
    if operation == "background":
        store = Store(path, memory_budget_bytes=size.memory_budget_bytes)
        return lambda: store.save_in_background(state.objects).wait()
    chosen = next(m for m in methods(state) if m.name == method)
    return lambda: chosen.save(path) if operation == "save" else chosen.load(path)
