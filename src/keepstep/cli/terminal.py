"""A terminal, by way of rich: its width, and its colours where it has and wants them (NO_COLOR, TERM)."""

from __future__ import annotations

import functools
import sys

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from keepstep.cli.output import Cell

__all__ = ["Terminal"]

_COLOR_SYSTEMS = {
    "standard": ColorSystem.STANDARD,
    "256": ColorSystem.EIGHT_BIT,
    "truecolor": ColorSystem.TRUECOLOR,
    "windows": ColorSystem.WINDOWS,
}


class Terminal:
    """Standard output on a terminal."""

    def __init__(self) -> None:
        console = Console(file=sys.stdout)
        self.width: int | None = console.width
        self._colors = _COLOR_SYSTEMS.get(console.color_system or "")
        self._no_color = console.no_color

    def paint(self, cell: Cell) -> str:
        if not cell.style or self._colors is None:
            return cell.text
        style = _parse(cell.style)
        return (style.without_color if self._no_color else style).render(cell.text, color_system=self._colors)


@functools.cache
def _parse(style: str) -> Style:
    return Style.parse(style)
