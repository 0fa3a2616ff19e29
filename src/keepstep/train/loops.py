"""Which loop over epochs a call of `epochs()` begins.

A script may have several such loops, one after the other. They are told apart by their order alone, so a
run that resumes counts them from the top of the script, as it executes it from there. `load_state()` in a
script that has begun a loop is another matter: the script stays where it is, leaves its loops, and the one
that it begins next is the one that the checkpoint was made in.
"""

from __future__ import annotations

import logging
import sys

from keepstep.errors import UsageError

__all__ = ["Loops"]

_log = logging.getLogger(__name__)


class Loops:
    """Counts the loops over epochs that a script begins.

    Attributes:
        begun: loops so far, those of the run that was resumed included; the next one has this number.
        most_begun: as `begun` was before the script went back.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.most_begun = 0
        self._restored: int | None = None
        self._went_back = False

    def begin(self) -> tuple[int, bool]:
        """Count the loop that begins now.

        Returns:
            Its number, and whether it is the one that the restored checkpoint was made in.
        """
        number = self.begun
        self.begun += 1
        self.most_begun = max(self.most_begun, self.begun)
        restored = number == self._restored
        if restored:
            self._restored = None
        return number, restored

    @property
    def waiting(self) -> bool:
        """Whether the loop that the restored checkpoint was made in is still to come."""
        return self._restored is not None

    def restore(self, number: int) -> None:
        """A checkpoint was restored: the script begins at its top.

        Args:
            number: of the loop that it was made in or after; -1 if none had begun.
        """
        self.begun = 0
        self._restored = number if number >= 0 else None
        self._went_back = False

    def go_back(self) -> None:
        """As `restore` said, but in the middle of the script: the next loop is the restored one."""
        if self.most_begun:
            self.begun = self._restored or 0
            self._went_back = True

    def check_reached(self, first: int, count: int) -> None:
        """Raise UsageError if a script that went back begins a shorter loop than the one it went back to.

        Args:
            first: epoch to go on with.
            count: epochs that the loop was asked for.
        """
        if self._went_back and first > count:
            raise UsageError(
                f"load_state() went back to epoch {first} of a loop over epochs, and the loop that begins "
                f"next, epochs({count}), has no such epoch. The first epochs() after load_state() goes on "
                "with the loop that the checkpoint was made in: begin that one first."
            )
        self._went_back = False

    def check_not_nested(self, number: int) -> None:
        """Raise UsageError if another loop was begun within this one.

        Args:
            number: of the loop that is asked for its next epoch.
        """
        if self.begun != number + 1:
            raise UsageError(
                "A loop over epochs() has begun inside another one that goes on. Loops over epochs() are "
                "told apart by their order, so a resumed run would take this one for complete. Keep "
                "epochs() for one of them, and a plain range() or a single epochs(outer * inner) for the "
                "rest."
            )

    def check_end(self) -> None:
        """Raise UsageError if the script ends, and had begun loops, but none that it was to go on with."""
        over = self._went_back or sys.exception() is not None  # it ends with another state, or in failure
        if not over and self._restored is not None and 0 < self.begun <= self._restored:
            raise UsageError(
                f"The checkpoint that this run went on from was made in loop {self._restored} over epochs() "
                f"(counted from 0), and the script ends after {self.begun} of them: it has trained nothing. "
                "Each call of epochs() that begins counts, those of an attempt that failed too. Run the "
                "script that the checkpoint is of, or begin anew in another project_dir."
            )

    def tell_complete(self, number: int) -> None:
        """Say that a loop yields nothing, since it was complete when the checkpoint was made."""
        _log.info("loop %d over epochs was complete at the checkpoint: it is not run again", number)
