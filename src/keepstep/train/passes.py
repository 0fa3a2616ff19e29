"""Where a loader stands, and what is known of a pass over it.

A *pass* is one iteration over a prepared loader. It is *open* from its first batch until it is exhausted or
left. Passes may overlap: an evaluation inside a training loop, two loaders side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Cursor", "OpenPass"]


@dataclass(eq=False)
class Cursor:
    """Where one loader stands.

    Attributes:
        index: the loader's number, in the order of preparation.
        pass_number: of the pass that was begun last, from 0; -1 before the first.
        position: units (see `data/shares.py`) of that pass given out, over all ranks together; with one
            process that is batches. The same on every rank: another number of ranks can go on from there.
        length: the position after this rank's last batch of that pass, None while unknown.
        remainder: samples of the pass's last step that are no fillers; see `shares.Plan`.
        current: that pass while it is open, or restored and not yet continued.
        loader: the loader itself, as long as it lives.
    """

    index: int
    pass_number: int = -1
    position: int = 0
    length: int | None = None
    remainder: int = -1
    current: OpenPass | None = None
    loader: Callable[[], Any] = lambda: None

    @property
    def at_end(self) -> bool:
        """Whether this rank was given its last batch of the pass."""
        return self.length is not None and self.position >= self.length


@dataclass(eq=False)
class OpenPass:
    """A pass that has begun and has not ended.

    Attributes:
        cursor: of its loader.
        with_gradients: gradients were on when it began.
        ended_before: passes that had ended in this epoch when it began, by loader; no nested ones.
        nested: it began within the outermost one.
        carried: it says nothing about where the script stands.
        waiting: it was restored, and its loader was not iterated since.
        handling: id of the exception that was being handled when it began.
        within: where the outermost pass was when it began: loader, pass and position. None for the outermost
            one itself, and for one that was restored.
        restores: how often a state had been restored when it began.
    """

    cursor: Cursor
    with_gradients: bool
    ended_before: Counter[int] = field(default_factory=Counter)
    nested: bool = False
    carried: bool = False
    waiting: bool = False
    handling: int = 0
    within: tuple[int, int, int] | None = None
    restores: int = 0
