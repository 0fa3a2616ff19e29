"""Tables, and bars with what was measured beside what was promised."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

__all__ = ["Bar", "at_least", "at_most", "heading", "note", "show_bars", "show_table", "status"]

_WIDTH = 118
_console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A promise and what became of it."""

    name: str
    target: str
    measured: str
    met: bool


def at_most(name: str, measured: float, limit: float, unit: str, *, digits: int = 2) -> Bar:
    """A bar that is met from below."""
    return Bar(
        name=name,
        target=f"<= {limit:g}{unit}",
        measured=f"{measured:.{digits}f}{unit}",
        met=measured <= limit,
    )


def at_least(name: str, measured: float, limit: float, unit: str, *, digits: int = 2) -> Bar:
    """A bar that is met from above."""
    return Bar(
        name=name,
        target=f">= {limit:g}{unit}",
        measured=f"{measured:.{digits}f}{unit}",
        met=measured >= limit,
    )


def heading(text: str) -> None:
    _console.print()
    _console.rule(text, style="dim")


def note(text: str) -> None:
    _console.print(text, style="dim", markup=False)


def status(text: str) -> AbstractContextManager[object]:
    """A line that moves on a terminal and leaves nothing in a log."""
    return _console.status(text)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; all columns but the first are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    _console.print(table)


def show_bars(title: str, bars: Iterable[Bar]) -> None:
    """Print bars: target, measured, met or not."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column, side in (("bar", "left"), ("target", "right"), ("measured", "right"), ("met?", "left")):
        table.add_column(column, justify="right" if side == "right" else "left")
    for bar in bars:
        met = "[green]yes[/]" if bar.met else "[bold red]NO[/]"
        table.add_row(bar.name, bar.target, bar.measured, met)
    _console.print(table)
