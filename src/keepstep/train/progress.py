"""How far a run has come: its epoch, the passes over its loaders (see `passes.py`), and what is repeated.

A resumed run executes its script from the top, so it has to be told what to leave out. The open pass that
began first in this epoch, the *outermost*, says where the script stands:

- With none, an epoch counts as done once a pass with gradients has ended in it, since a checkpoint after the
  last batch is what a loop's epilogue writes. Epochs that are done aren't yielded again (see `ended.py`).
- With one, it goes on at its position. Passes that had ended before it began yield nothing. Those *nested*
  in it don't matter, nor those in one that yields nothing.
- Passes that outlive the outermost, or the epoch they began in, are *carried*: they say nothing about where
  the script stands. They go on too, like every open pass. Only one that began with gradients off, inside an
  outermost one with gradients on, is dropped if that one still is at the same batch: it is an evaluation that
  will not be reached again. Loaders read side by side get there as well, at their first batch, but gradients
  are on again by the time that a checkpoint is made.

`load_state()` in the middle of a script is the one case in which loops run that know nothing of the state
they run in. They are void from then on: a pass or a loop over epochs that began before it and is asked for
more raises. Those that begin after it go on where the restored run stood; `loops.py` says which loop that is.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from keepstep.errors import UsageError
from keepstep.train.draws import Draws
from keepstep.train.ended import EndedPasses
from keepstep.train.loops import Loops
from keepstep.train.passes import Cursor, OpenPass

__all__ = ["Progress"]


class Progress:
    """Keeps the cursors of all loaders, the open passes and the epoch."""

    def __init__(self) -> None:
        self.cursors: list[Cursor] = []
        self.epoch: int | None = None
        self._loop = -1
        self._done = False
        self._inside = False
        self._finished = 0
        self._was_finished = self._finished_here = False
        self._left = False
        self._loops = Loops()
        self._restores = 0
        self._open: list[OpenPass] = []
        self.ended = EndedPasses()
        self.draws = Draws()
        self._before_leaving: tuple[int, dict[str, Any]] | None = None

    def new_cursor(self) -> Cursor:
        """Add a loader."""
        cursor = Cursor(index=len(self.cursors))
        self.cursors.append(cursor)
        return cursor

    # -- passes ---------------------------------------------------------------------------------------

    def will_skip(self, cursor: Cursor) -> bool:
        """Whether the loader's next iteration had ended before the run was interrupted."""
        return self.ended.will_skip(cursor.index)

    def skips(self, cursor: Cursor) -> bool:
        """As `will_skip`, for the iteration that begins now."""
        return self.ended.skip(cursor.index)

    def begin(self, cursor: Cursor, first: int | None = None) -> OpenPass:
        """Begin a pass, or go on with a restored one, at unit `cursor.position`.

        Args:
            cursor: of the loader.
            first: unit to start at, whatever was restored.
        """
        entry = cursor.current
        if entry is not None and entry.waiting:
            entry.waiting = False
            if entry is self._outermost():
                self.draws.check(f"loader {cursor.index} goes on")
                self.draws.forget()
        else:
            if entry is not None:
                self.end(entry)
            within = self._outermost_at()
            entry = OpenPass(cursor, torch.is_grad_enabled(), Counter(self.ended.times))
            entry.within, entry.nested = within, within is not None
            if entry.with_gradients and self._inside:
                self.ended.check(f"the pass over loader {cursor.index}", self.epoch)
            self._open.append(entry)
            cursor.pass_number += 1
            cursor.position = 0
        cursor.current, cursor.length, cursor.remainder = entry, None, -1
        if first is not None:
            cursor.position = first
        entry.handling, entry.restores = id(sys.exception()), self._restores
        self._before_leaving = None
        return entry

    def check(self, entry: OpenPass) -> None:
        """Raise UsageError if a pass is asked for more that began before the run went back."""
        if entry.restores != self._restores:
            raise self._void(f"a loop over loader {entry.cursor.index} goes on")

    @staticmethod
    def _void(what: str) -> UsageError:
        return UsageError(
            f"The run went back by load_state(), and {what} that began before it: what it would give next is "
            "not what comes next in the restored run. Leave the loops after load_state(), those over batches "
            "and those over epochs, and begin them anew: they go on where the checkpoint was made."
        )

    def advance(self, entry: OpenPass, units: int) -> None:
        """Note that a pass gives out its next batch.

        Args:
            entry: the pass.
            units: what a step of all ranks takes; the last one may be left with less.
        """
        cursor = entry.cursor
        if cursor.current is entry:
            cursor.position += units
            if cursor.length is not None:
                cursor.position = min(cursor.position, cursor.length)
            self._before_leaving = None

    def leave(self, entry: OpenPass) -> None:
        """Note that a pass was left before its end: by `break`, or by an exception.

        Which of them can't be told yet. Should a checkpoint be made while an exception is handled and before
        anything else was iterated, it was that one, and the pass is still open in the checkpoint.
        """
        if entry.cursor.current is not entry:
            return
        before = self._before_leaving or (entry.handling, self._state())
        self.end(entry)
        self._before_leaving = before

    def goes_on(self, cursor: Cursor) -> bool:
        """Whether a run that resumes from a checkpoint made now goes on with the loader's last pass."""
        return any(saved["loader"] == cursor.index for saved in self._state()["open"])

    def next_pass(self, cursor: Cursor, number: int) -> None:
        """Make the loader's next pass number `number`, from its first batch."""
        if cursor.current is not None:
            self.end(cursor.current)
        cursor.pass_number, cursor.position = number - 1, 0

    def end(self, entry: OpenPass) -> None:
        """Note that a pass was exhausted or left. One that `load_state_dict` replaced is ignored."""
        if entry.cursor.current is not entry:
            return
        outermost = self._outermost()
        self._before_leaving = None
        entry.cursor.current = None
        self._open.remove(entry)
        self.ended.add(entry.cursor.index, trained=self._inside and entry.with_gradients, nested=entry.nested)
        if entry is outermost:
            self._carry_open()

    def give_up(self, entry: OpenPass) -> None:
        """Note that the iteration which was to continue a restored pass never asked for a batch."""
        if entry.waiting:
            self.end(entry)

    def _carry_open(self) -> None:
        for entry in self._open:
            entry.carried = True

    def _outermost(self) -> OpenPass | None:
        return next((entry for entry in self._open if not entry.carried), None)

    def _outermost_at(self) -> tuple[int, int, int] | None:
        outermost = self._outermost()
        if outermost is None:
            return None
        cursor = outermost.cursor
        return cursor.index, cursor.pass_number, cursor.position

    def at_last_batch(self) -> bool:
        """Whether the loader that began last among the open ones has given out its last batch."""
        for entry in reversed(self._open):  # asked at every batch: as `innermost`, without further calls
            if not entry.waiting:
                return entry.cursor.at_end
        return False

    def innermost(self) -> Cursor | None:
        """Of the loaders that are being iterated, the one that began last."""
        for entry in reversed(self._open):
            if not entry.waiting:
                return entry.cursor
        return None

    # -- epochs ---------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epochs of 0 to count - 1 that are still to run.

        A script may have several such loops one after the other: those that were complete when a
        checkpoint was made yield nothing in the run that resumes from it. So does one that was left for
        good (see `finish`).
        """
        loops, restores = self._loops, self._restores
        loop, restored = loops.begin()
        if loops.waiting:
            loops.tell_complete(loop)
            return
        if loop < self._finished:
            return
        self._left = False
        first, repeats = 0, False
        if restored:
            if self.epoch is not None:
                first, repeats = self.epoch + self._done, not self._done
            loops.check_reached(first, count)
            if first < count:
                self.draws.check(f"epoch {first} begins")
        if not repeats:
            self.draws.forget()
        for epoch in range(first, count):
            self._enter_epoch(loop, epoch, repeats and epoch == first)
            yield epoch
            if restores != self._restores:
                raise self._void("a loop over epochs goes on")
            if loops is self._loops:  # else all of it was given up
                loops.check_not_nested(loop)
        self._loop, self._done, self._inside = loop, True, False
        self.epoch = max(first, count) - 1

    def note_training(self) -> None:
        """Note that an optimizer is stepped."""
        self.ended.note_training()
        if self.ended.taken_for_done and self._inside and self._outermost() is None:
            self.ended.check("the optimizer's step", self.epoch)

    def finish(self) -> bool:
        """Note that the run is not to be gone on with.

        Neither is the loop over epochs that was left early, nor the one that the run went back to after it.

        Returns:
            Whether that is news: False if the last loop has yielded all its epochs (a script that asks for
            more goes on), or if it was known.
        """
        if self._finished or not (self._inside or self._left):
            return False
        self._finished, self._finished_here = max(self._loops.most_begun, self._loop + 1), True
        return True

    def unfinish(self) -> None:
        """Take back what `finish` has noted: it could not be saved."""
        self._finished, self._finished_here = 0, False

    def check_end(self) -> None:
        """Raise UsageError if the script ends and has not come to the loop that it was to go on with."""
        self._loops.check_end()

    def go_back(self, *, kept: bool) -> None:
        """Note that what `load_state_dict` was given was restored in the middle of the script.

        Args:
            kept: the run has a place for its checkpoints: the state that it ends with is to be the newest.
        """
        self._loops.go_back()
        self._left = kept and self._loops.most_begun > 0 and not self._was_finished

    def clear(self) -> None:
        """Forget all of it; passes that are still being iterated are counted no more."""
        for entry in self._open:
            entry.cursor.current = None
        restores = self._restores
        vars(self).update(vars(Progress()))
        self._restores = restores

    def _enter_epoch(self, loop: int, epoch: int, repeats: bool) -> None:
        self._before_leaving = None
        self._loop, self.epoch, self._done, self._inside = loop, epoch, False, True
        self._finished, self._was_finished, self._finished_here = 0, False, False
        outermost = self._outermost()
        before = None if outermost is None else outermost.ended_before
        self.ended.begin_epoch(epoch, repeats=repeats, before=before)
        if not repeats:
            self._carry_open()

    # -- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain values."""
        state = self._state()
        if state["done"] and not self._done:
            self.ended.saved_as_done()
        return state

    def _state(self) -> dict[str, Any]:
        if self._before_leaving is not None:
            handling, before = self._before_leaving
            if sys.exception() is not None and id(sys.exception()) != handling:
                return before
        going_on = self._going_on()
        ended = self._inside and self._outermost() is None and self.ended.is_epilogue
        return {
            "loop": self._loop,
            "epoch": self.epoch,
            "done": self._done or ended,
            "finished": self._finished,
            "ended": self.ended.state_dict(inside=self._inside),
            "cursors": [
                {
                    "pass": cursor.pass_number,
                    "position": cursor.position,
                    "active": cursor.current in going_on,
                }
                for cursor in self.cursors
            ],
            "open": [
                {
                    "loader": entry.cursor.index,
                    "with_gradients": entry.with_gradients,
                    "nested": entry.nested,
                    "carried": entry.carried,
                    "ended_before": {str(index): times for index, times in entry.ended_before.items()},
                }
                for entry in going_on
            ],
        }

    def _going_on(self) -> list[OpenPass]:
        """The open passes that a resumed run continues, in the order in which they began."""
        outermost = self._outermost()
        if outermost is None or not outermost.with_gradients:
            return list(self._open)
        return [entry for entry in self._open if not self._is_evaluation(entry)]

    def _is_evaluation(self, entry: OpenPass) -> bool:
        """Whether a pass inside the outermost one is under way now, or was until an exception was raised."""
        if entry.with_gradients or entry.carried or entry.within != self._outermost_at():
            return False
        raised = sys.exception()
        return not torch.is_grad_enabled() or (raised is not None and id(raised) != entry.handling)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what was saved; passes that are still open here are void."""
        self.epoch, self._loop, self._done = state["epoch"], state["loop"], state["done"]
        self._inside = False
        self._was_finished = self._was_finished or (self._finished > 0 and not self._finished_here)
        self._finished = state["finished"]
        self._before_leaving = None
        self._restores += 1
        self._loops.restore(self._loop)
        self.ended.load_state_dict(state["ended"])
        for cursor, saved in zip(self.cursors, state["cursors"], strict=True):
            cursor.pass_number, cursor.position = saved["pass"], saved["position"]
            cursor.length, cursor.current = None, None
        self._open = []
        for saved in state["open"]:
            cursor = self.cursors[saved["loader"]]
            ended_before = Counter({int(index): times for index, times in saved["ended_before"].items()})
            cursor.current = OpenPass(
                cursor,
                saved["with_gradients"],
                ended_before,
                nested=saved["nested"],
                carried=saved["carried"],
                waiting=True,
            )
            self._open.append(cursor.current)
