"""What writes to saved tensors waits here until they have been copied."""

from __future__ import annotations

import time
import weakref
from typing import Any

from keepstep.checkpoint.pending import PendingSave

__all__ = ["StagingGate", "closed_gates"]


class StagingGate:
    """Between a checkpoint that is being copied in the background and the next optimizer step.

    Attributes:
        pending: the save whose copy may be under way.
        waited_s: how long steps have waited here so far, in seconds.
    """

    def __init__(self) -> None:
        self._pending: PendingSave | None = None
        self.waited_s = 0.0

    @property
    def pending(self) -> PendingSave | None:
        return self._pending

    @pending.setter
    def pending(self, save: PendingSave | None) -> None:
        self._pending = save
        (closed_gates.discard if save is None else closed_gates.add)(self)

    def wait(self) -> None:
        """Return once nothing is being copied."""
        pending = self._pending
        if pending is not None:
            began_s = time.perf_counter()
            pending.wait_staged()
            self.pending = None  # not before: Ctrl-C may end the wait, and the next step waits again
            self.waited_s += time.perf_counter() - began_s

    def __getstate__(self) -> dict[str, Any]:
        """A copy of an optimizer goes its own way: nothing of it is being saved."""
        return {"_pending": None, "waited_s": 0.0}


closed_gates: weakref.WeakSet[StagingGate] = weakref.WeakSet()
"""Those with something pending: asked before every step of every optimizer."""
