"""What the demo shows while it works: bars on a terminal, now and then a line elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["Bars", "Lines", "TerminalBars", "bars_for"]


class Bars(Protocol):
    """Shows how far several things are."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, name: str, done: int) -> None:
        """Say how many steps of a thing are done; 0 leaves it as it was."""

    def say(self, text: str) -> None:
        """Write a line that stays."""


class TerminalBars:
    """Progress bars.

    Args:
        console: a terminal.
        totals: name of each thing -> its steps.
    """

    def __init__(self, console: Console, totals: Mapping[str, int]) -> None:
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(50),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console)
        self._tasks = {name: self._progress.add_task(name, total=total) for name, total in totals.items()}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, name: str, done: int) -> None:
        if done:
            self._progress.update(self._tasks[name], completed=done)

    def say(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)


class Lines:
    """A line whenever another quarter is done, for logs.

    Args:
        console: anything.
        totals: name of each thing -> its steps.
    """

    def __init__(self, console: Console, totals: Mapping[str, int]) -> None:
        self._console = console
        self._totals = totals
        self._quarters = dict.fromkeys(totals, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, name: str, done: int) -> None:
        quarters = 4 * done // self._totals[name]
        if quarters > self._quarters[name]:
            self._quarters[name] = quarters
            self.say(f"{name}: {done} of {self._totals[name]} steps")

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)


def bars_for(console: Console, totals: Mapping[str, int]) -> Bars:
    """Choose by where the output goes."""
    return (TerminalBars if console.is_terminal else Lines)(console, totals)
