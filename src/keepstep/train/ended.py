"""What of an epoch has ended: the passes that a resumed run leaves out, and whether the epoch is done.

A checkpoint with no pass open may be that of a loop's epilogue, or stand between two loops of one epoch. If a
pass with gradients has ended, or one without after a step, it counts as the epilogue: what follows is not
run again. If only others have, an evaluation came first: the epoch is run again without it.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

__all__ = ["EndedPasses"]

_log = logging.getLogger(__name__)


class EndedPasses:
    """Counts the passes that have ended in an epoch.

    Attributes:
        times: by loader.
    """

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()
        self._trained = False
        self._restored: Counter[int] = Counter()
        self._skip: Counter[int] = Counter()
        self._taken_for_done = False

    def begin_epoch(self, *, repeats: bool, before: Counter[int] | None) -> None:
        """An epoch begins.

        Args:
            repeats: it is the one that the restored checkpoint was made in.
            before: then, passes that had ended before the outermost one began; None if none was open.
        """
        self._trained = self._trained and repeats
        self._skip = Counter(self._restored if before is None else before) if repeats else Counter()
        self.times.clear()
        self._restored.clear()
        self._taken_for_done = False

    def add(self, loader: int, *, trained: bool) -> None:
        """A pass has ended; `trained`: in an epoch, and it was one with gradients."""
        self.times[loader] += 1
        self._trained = self._trained or trained

    def note_training(self) -> None:
        """An optimizer is stepped: the epoch trains, wherever its batches come from."""
        self._trained = True

    def will_skip(self, loader: int) -> bool:
        """Whether the loader's next iteration had ended before the run was interrupted."""
        return self._skip[loader] > 0

    def skip(self, loader: int) -> bool:
        """As `will_skip`, for the iteration that begins now."""
        if not self.will_skip(loader):
            return False
        self._skip[loader] -= 1
        self.times[loader] += 1
        return True

    @property
    def make_it_done(self) -> bool:
        """Whether an epoch with no pass open is done."""
        return self._trained and self.times.total() > 0

    def saved_as_done(self) -> None:
        """A checkpoint was made that takes the epoch for done."""
        self._taken_for_done = True

    def check(self, loader: int, epoch: int | None) -> None:
        """Warn, once in an epoch, if a pass with gradients begins in one that a checkpoint takes for done."""
        if self._taken_for_done:
            self._taken_for_done = False
            _log.warning(
                "A checkpoint was made between two loops of epoch %s. A run that resumes from it takes the "
                "epoch for done and does not come to the one over loader %d that begins now: save inside of "
                "a loop, or after the last one of the epoch.",
                epoch,
                loader,
            )

    def state_dict(self, *, inside: bool) -> dict[str, Any]:
        """Return what a resumed run needs; `inside`: an epoch is under way."""
        times = self.times if inside else self._restored
        return {"trained": self._trained, "times": {str(loader): count for loader, count in times.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what was saved; the epoch that begins next may repeat it."""
        self.times.clear()
        self._skip.clear()
        self._taken_for_done = False
        self._trained = state["trained"]
        self._restored = Counter({int(loader): count for loader, count in state["times"].items()})
