"""What of an epoch has ended: the passes that a resumed run leaves out, and whether the epoch is done.

A checkpoint with no pass open may be that of a loop's epilogue, or stand between two loops of one epoch. If a
pass with gradients has ended, it counts as the epilogue: what follows is not run again. So it does if another
one has, an evaluation, since the last step of an epoch that is trained by hand, without a prepared loader.
Otherwise the epoch is run again: without the evaluations that came first, or with all of it if it is one that
was trained by hand in part.
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
        times: by loader, without nested ones.
        is_epilogue: nothing of the epoch is still to come, as far as it can be told; with no pass open.
        taken_for_done: a checkpoint says so, and nothing has shown yet that more was to come.
    """

    def __init__(self) -> None:
        self.times: Counter[int] = Counter()
        self.is_epilogue = False
        self._stepped = False
        self._passed = False
        self._restored: Counter[int] = Counter()
        self._skip: Counter[int] = Counter()
        self.taken_for_done = False

    def begin_epoch(self, number: int, *, repeats: bool, before: Counter[int] | None) -> None:
        """An epoch begins.

        Args:
            number: of it.
            repeats: it is the one that the restored checkpoint was made in.
            before: then, passes that had ended before the outermost one began; None if none was open.
        """
        if repeats and self._stepped and not self._passed and before is None:
            _log.warning(
                "Epoch %d is run again from its start: steps had been made in it outside of any loop over a "
                "prepared loader, and nothing says where the script stood. Prepare the loader that it trains "
                "from, or save after an evaluation over a prepared one that ends the epoch.",
                number,
            )
        self._stepped, self._passed = False, self._passed and repeats
        self.is_epilogue = False
        self._skip = Counter(self._restored if before is None else before) if repeats else Counter()
        self.times.clear()
        self._restored.clear()
        self.taken_for_done = False

    def add(self, loader: int, *, trained: bool, nested: bool) -> None:
        """A pass has ended.

        Args:
            loader: its number.
            trained: in an epoch, and it was one with gradients.
            nested: it began within another one.
        """
        if not nested:
            self.times[loader] += 1
        self._passed = self._passed or trained
        self.is_epilogue = self._passed or self._stepped

    def note_training(self) -> None:
        """An optimizer is stepped: the epoch trains, wherever its batches come from."""
        self._stepped = True
        self.is_epilogue = self._passed

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

    def saved_as_done(self) -> None:
        """A checkpoint was made that takes the epoch for done."""
        self.taken_for_done = True

    def check(self, what: str, epoch: int | None) -> None:
        """Warn, once in an epoch, if it trains on though a checkpoint takes it for done.

        Args:
            what: trains now.
            epoch: its number.
        """
        if self.taken_for_done:
            self.taken_for_done = False
            _log.warning(
                "A checkpoint was made between two loops of epoch %s. A run that resumes from it takes the "
                "epoch for done and does not come to %s that begins now: save inside of a loop over a "
                "prepared loader, before an evaluation, or after the last loop of the epoch.",
                epoch,
                what,
            )

    def state_dict(self, *, inside: bool) -> dict[str, Any]:
        """Return what a resumed run needs; `inside`: an epoch is under way."""
        times = self.times if inside else self._restored
        if inside and self._stepped and not self._passed:
            times = Counter()  # its steps are made again, and what was evaluated after them
        return {
            "stepped": self._stepped,
            "passed": self._passed,
            "times": {str(loader): count for loader, count in times.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what was saved; the epoch that begins next may repeat it."""
        self.times.clear()
        self._skip.clear()
        self.taken_for_done = False
        self._stepped, self._passed, self.is_epilogue = state["stepped"], state["passed"], False
        self._restored = Counter({int(loader): count for loader, count in state["times"].items()})
