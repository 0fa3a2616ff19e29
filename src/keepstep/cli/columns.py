"""A table as text: whole through a pipe, fitted to a terminal by leaving out what matters least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells, set_cell_size

from keepstep.cli.output import Cell, Output

__all__ = ["Column", "Fitted", "fit", "render", "render_pairs"]

_GAP = 2
_LEAST = 3
_NOTE_INDENT = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column.

    Attributes:
        header: its name.
        cells: one for each row.
        right: aligned to the right, as numbers are.
        rank: on a terminal that is too narrow the highest goes first; 0 stays.
        least: it may be cut down to this width before any column goes; None: it is not cut before that.
    """

    header: str
    cells: Sequence[Cell]
    right: bool = False
    rank: int = 0
    least: int | None = None

    @property
    def natural_width(self) -> int:
        """Cells of a terminal that its longest text takes."""
        longest = max((_width(cell.text) for cell in self.cells), default=0)
        return max(_width(Cell(self.header).text), longest)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """What of a table is shown.

    Attributes:
        columns: each with its width.
        left_out: headers of those for which there was no room.
    """

    columns: Sequence[tuple[Column, int]]
    left_out: Sequence[str] = ()


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)


def fit(columns: Sequence[Column], width: int | None) -> Fitted:
    """Choose columns and their widths so that a row takes no more than `width` (None: any)."""
    widths = {id(column): column.natural_width for column in columns}
    shown = list(columns)
    left_out: list[str] = []
    while width is not None and (excess := _total(shown, widths) - width) > 0:
        soft = [c for c in shown if c.least is not None and widths[id(c)] > c.least]
        spare = max(shown, key=lambda column: column.rank)
        if soft:
            column = max(soft, key=lambda c: widths[id(c)])
            widths[id(column)] = max(column.least or 0, widths[id(column)] - excess)
        elif spare.rank > 0:
            shown.remove(spare)
            left_out.insert(0, spare.header)
        else:  # hardly a terminal at all: cut what is left, the widest first
            column = max(shown, key=lambda c: widths[id(c)])
            if widths[id(column)] <= _LEAST:
                left_out.insert(0, shown.pop().header)
                continue
            widths[id(column)] = max(_LEAST, widths[id(column)] - excess)
    return Fitted(columns=[(column, widths[id(column)]) for column in shown], left_out=left_out)


def _total(columns: Sequence[Column], widths: Mapping[int, int]) -> int:
    return sum(widths[id(column)] for column in columns) + _GAP * max(0, len(columns) - 1)


def render(
    fitted: Fitted,
    output: Output,
    *,
    notes: Mapping[int, Sequence[Cell]] | None = None,
    header: bool = True,
    indent: int = 0,
) -> Iterator[str]:
    """The lines of a table.

    Args:
        fitted: from `fit`.
        output: decides on styles.
        notes: row -> lines to put below it, indented.
        header: whether to begin with the names of the columns.
        indent: spaces before each line.
    """
    columns = fitted.columns
    if not columns:
        return
    if header:
        heads = [Cell(column.header, "dim") for column, _ in columns]
        yield _line(heads, columns, output, indent)
    for row, cells in enumerate(zip(*(column.cells for column, _ in columns), strict=True)):
        yield _line(cells, columns, output, indent)
        for note in (notes or {}).get(row, ()):
            yield from wrapped(note, output, indent + _NOTE_INDENT)


def _line(cells: Sequence[Cell], columns: Sequence[tuple[Column, int]], output: Output, indent: int) -> str:
    parts = []
    for place, (cell, (column, width)) in enumerate(zip(cells, columns, strict=True)):
        free = width - _width(cell.text)
        if free < 0:
            cell, free = Cell(set_cell_size(cell.text, width - 1) + "…", cell.style), 0
        text = output.paint(cell)
        if column.right:
            text = " " * free + text
        elif place < len(columns) - 1:  # no spaces at the end of a line
            text += " " * free
        parts.append(text)
    return " " * indent + (" " * _GAP).join(parts).rstrip(" ")


def wrapped(cell: Cell, output: Output, indent: int, first: str = "") -> Iterator[str]:
    """A long text, broken at words to fit the terminal; in one line where there is none.

    Args:
        cell: the text.
        output: gives the width.
        indent: spaces before each line.
        first: takes the place of the first line's indent; already painted.
    """
    room = None if output.width is None else max(output.width - indent, 8)
    lines = [cell.text] if room is None or _width(cell.text) <= room else _broken(cell.text, room)
    for place, text in enumerate(lines):
        yield (first if place == 0 and first else " " * indent) + output.paint(Cell(text, cell.style))


def _broken(text: str, room: int) -> list[str]:
    """Lines of at most `room` cells, broken at spaces where there are any."""
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if _width(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        *full, last = chop_cells(word, room) or [""]
        lines[-1:] = [*full, last]
    return lines


def render_pairs(pairs: Sequence[tuple[str, Cell]], output: Output, *, indent: int = 0) -> Iterator[str]:
    """Lines of `name  value`, the values below each other and broken to fit the terminal."""
    names = [Cell(name, "dim") for name, _ in pairs]
    widest = max((_width(name.text) for name in names), default=0)
    if output.width is not None:
        widest = min(widest, max(8, output.width // 3))
    for name, (_, value) in zip(names, pairs, strict=True):
        free = widest - _width(name.text)
        if free < 0 and output.width is not None:
            name, free = Cell(set_cell_size(name.text, widest - 1) + "…", name.style), 0
        first = " " * indent + output.paint(name) + " " * (free + _GAP)
        yield from wrapped(value, output, indent + widest + _GAP, first)
