"""Where a listing goes: a terminal, in its width and colours, or anything else, plain and whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import click

from keepstep.cli.phrasing import jsonable, printable

if TYPE_CHECKING:
    from keepstep.cli.bar import Bar

__all__ = ["Cell", "Output", "Plain", "open_bar", "open_output", "write_json", "write_lines"]


@dataclass(frozen=True, slots=True)
class Cell:
    """A piece of text and how it looks. What a terminal might act on is escaped here, for all output.

    Attributes:
        text: shown literally.
        style: rich's words for it ("bold red"); no effect but on a terminal.
    """

    text: str
    style: str = ""

    def __post_init__(self) -> None:
        if not self.text.isprintable():
            object.__setattr__(self, "text", printable(self.text))


class Output(Protocol):
    """What the commands need to know of standard output."""

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None if lines may be of any length."""
        ...

    def paint(self, cell: Cell) -> str:
        """The cell's text, in its style where there are styles."""
        ...


class Plain:
    """A pipe or a file: no colour, nothing cut, exact values."""

    width: int | None = None

    def paint(self, cell: Cell) -> str:
        return cell.text


def open_output() -> Output:
    """What standard output is; rich is imported for a terminal alone."""
    if sys.stdout is None or not sys.stdout.isatty():
        return Plain()
    terminal: Output = import_module("keepstep.cli.terminal").Terminal()
    return terminal


def open_bar(total_bytes: int, stream: TextIO | None) -> Bar | None:
    """A progress bar on a stream to which nothing else writes meanwhile; None if that is no terminal."""
    if stream is None or not stream.isatty():
        return None
    bar: Bar = import_module("keepstep.cli.bar").Bar(total_bytes, stream)
    return bar


def write_lines(lines: Iterable[str]) -> None:
    """Write a listing in one go."""
    click.echo("\n".join(lines))


def write_json(document: dict[str, Any]) -> None:
    """Write the one JSON document of a command: a member a line, and an item of a long list a line.

    So lines can be searched, and a thousand checkpoints cost no time (`json` indents in Python, not in C).
    """
    members = [f"{json.dumps(key)}: {_spread(value)}" for key, value in jsonable(document).items()]
    click.echo("{\n " + ",\n ".join(members) + "\n}")


def _spread(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n  " + ",\n  ".join(json.dumps(item, allow_nan=False) for item in value) + "\n ]"
    return json.dumps(value, allow_nan=False)
