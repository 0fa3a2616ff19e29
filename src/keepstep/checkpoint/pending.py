"""A save that goes on in the background, and the failures of such saves that nobody asked about."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable

from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import BackgroundSaveError, StillSavingError
from keepstep.outcome import Latch, Outcome

__all__ = ["PendingSave", "forget_unseen_failures", "report_unseen_failures"]

log = logging.getLogger(__name__)

_unseen: set[PendingSave] = set()
"""Saves that failed and that nobody has asked about, whether or not their store is still there."""


class PendingSave:
    """A save in the background.

    Attributes:
        place: where the checkpoint will lie once it is committed; `str()` shows it.
        blocked_s: how long the caller was blocked when it began, in seconds.
    """

    def __init__(
        self,
        outcome: Outcome[Checkpoint],
        *,
        place: Place,
        staged: Latch,
        seal: Callable[[], None],
        spoiled: Callable[[], bool],
        blocked_s: float,
    ) -> None:
        self._outcome = outcome
        self._staged = staged
        self._seal = seal
        self._spoiled = spoiled
        self.place = place
        self.blocked_s = blocked_s
        self.seen = False
        self._pid = os.getpid()
        self._ordered_by = threading.get_ident()
        outcome.before_it_is_told(self._note)

    def __repr__(self) -> str:
        return f"<PendingSave {self.place}: {self._how_far}>"

    @property
    def _how_far(self) -> str:
        if self.inherited:
            return f"saved by process {self._pid}"
        if self.failed:
            return f"failed ({self._outcome.error()!r:.200})"
        if self._outcome.done():
            return "committed"
        return "copied, being written" if self._staged.is_open else "being copied"

    def _note(self, error: BaseException | None) -> None:
        if isinstance(error, Exception):
            _unseen.add(self)

    def wait_staged(self) -> None:
        """Wait until the state has been copied, and may change; returns at once if it was copied at once.

        Call it on the thread that is going to change the state.
        """
        if not self.inherited:
            self._staged.wait()
            self._seal()

    @property
    def spoiled(self) -> bool:
        """Whether tensors were written to while they were copied, so that it fails; waits for the copy."""
        self.wait_staged()
        return not self.inherited and self._spoiled()

    def _come_by(self, timeout_s: float | None) -> None:
        """Whoever ordered it writes to nothing while it is here; wait for the copy if need be."""
        if threading.get_ident() == self._ordered_by and self._staged.wait(timeout_s):
            self._seal()

    def done(self) -> bool:
        """Whether it is committed, or has failed."""
        if self.inherited:
            return True
        self._come_by(0)
        return self._outcome.done()

    @property
    def inherited(self) -> bool:
        """Whether the process that this one was forked from saves it; how that ends can't be told here."""
        return self._pid != os.getpid()

    @property
    def failed(self) -> bool:
        """Whether it is over and nothing was committed; `wait` says why."""
        return not self.inherited and self._outcome.done() and self._outcome.error() is not None

    def wait(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait until it is committed.

        Args:
            timeout_s: at most so long, in seconds; None: as long as it takes.

        Raises:
            StillSavingError: it is not over by then, and goes on.
            BackgroundSaveError: it failed; the cause is chained. Or this process was forked meanwhile.
        """
        if self.inherited:
            raise BackgroundSaveError(
                f"this save was begun by process {self._pid}, from which this one was forked: it is finished "
                "there, and can't be waited for here"
            )
        ends_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._come_by(timeout_s)
        if not self._outcome.wait(None if ends_s is None else max(0.0, ends_s - time.monotonic())):
            raise StillSavingError(
                f"{self.place} is not committed after {timeout_s} s: it is {self._how_far}. It goes on; wait "
                "again, or ask done()"
            )
        try:
            checkpoint = self._outcome.result()
        except Exception as error:
            self.seen = True
            _unseen.discard(self)
            raise BackgroundSaveError(
                f"a checkpoint could not be saved in the background: {error}"
            ) from error
        return checkpoint


@atexit.register
def report_unseen_failures() -> None:
    """The last chance to say that a background save failed; Python has waited for the threads by now."""
    for pending in list(_unseen):
        try:
            pending.wait()
        except BackgroundSaveError as error:
            log.critical("keepstep: %s", error)


def forget_unseen_failures() -> None:
    """A child's parent reports its own."""
    _unseen.clear()
