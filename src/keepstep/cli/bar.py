"""The progress bar of `keepstep verify`, with bytes a second. Imports rich: only for a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

__all__ = ["Bar"]


class Bar:
    """Grows with the bytes that were read, and is gone when all are; use as a context manager."""

    def __init__(self, total_bytes: int, stream: TextIO) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", style="dim", markup=False),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="cyan"),
            TaskProgressColumn(style="dim"),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=stream),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_bytes)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, name: str) -> None:
        """Name what is being read."""
        self._progress.update(self._task, description=name)

    def advance(self, size: int) -> None:
        """Count bytes that were read, or that never will be."""
        self._progress.advance(self._task, size)

    def write(self, line: str) -> None:
        """Write a finished line above the bar."""
        self._progress.console.print(Text.from_ansi(line), soft_wrap=True)
