"""A table that stays at the bottom of a terminal while trials run; what is printed goes above it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from keepstep.tune.experiment.trial import ERROR, Trial
from keepstep.tune.reporting.base import Overview, ProgressReporter
from keepstep.tune.reporting.table import Look, show
from keepstep.tune.reporting.watch import Watch
from keepstep.tune.reporting.words import in_one_line

__all__ = ["LiveReporter"]

_EVERY_S: Final = 0.25
_SHARE: Final = 20
"""Drawing takes at most one in so many seconds."""
_LINES_AROUND: Final = 8
_ERRORS: Final = 3


class LiveReporter(ProgressReporter):
    """Draws the table anew a few times a second, in the size that the terminal has then.

    Args:
        console: the terminal; None: standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console if console is not None else Console()
        self._live: Live | None = None
        self._hides = False
        self._watch: Watch | None = None
        self._next = 0.0

    @property
    def is_usable(self) -> bool:
        """Whether the terminal can go back in what it shows."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
        return done or time.monotonic() >= self._next

    def report(self, overview: Overview, done: bool) -> None:
        began = time.monotonic()
        if self._watch is None:
            self._watch = Watch(overview.metric, overview.mode)
        if self._live is None:
            live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._hides = True
            live.start()
            self._live = live
        for message in overview.messages:
            self._console.print(Text(in_one_line(message)))
        standing = self._watch.look(overview.trials)
        for trial, what in standing.news:
            if what in ("failed", "again"):
                word = ERROR if what == "failed" else "failed and is tried again"
                self._console.print(Text(f"{trial} {word}: {in_one_line(trial.error or '')}", "red"))
        rows = max(1, min(20, self._console.height - _LINES_AROUND))
        look = replace(Look(), max_rows=rows, max_errors=_ERRORS if done else 0)
        self._live.update(show(overview, standing, self._watch, look), refresh=True)
        self._next = began + max(_EVERY_S, _SHARE * (time.monotonic() - began))
        if done:
            self.close()

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        elif self._hides:  # it could not be drawn, or not for the last time, and the cursor is still hidden
            self._console.show_cursor(True)
        self._hides = False
