"""Progress in a Jupyter notebook: one table below the cell, drawn anew."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from IPython.display import HTML, clear_output, display
from rich.console import Console

from keepstep.tune.reporting.printed import TableReporter

__all__ = ["JupyterNotebookReporter"]

_FORMAT = (
    '<pre style="white-space:pre;overflow-x:auto;line-height:normal;'
    "font-family:Menlo,'DejaVu Sans Mono',consolas,'Courier New',monospace\">{code}</pre>"
)


class JupyterNotebookReporter(TableReporter):
    """Shows a table in the cell's output.

    Args:
        overwrite: whether what the cell has printed so far is cleared first.
        arguments: as of `CLIReporter`.
    """

    def __init__(self, *, overwrite: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._overwrite = overwrite
        self._handle: Any = None
        self._messages: list[str] = []

    def display(self, table: Any, messages: Sequence[str], done: bool) -> None:
        self._messages = [*self._messages, *messages][-5:]
        console = Console(file=io.StringIO(), record=True, width=160, force_jupyter=False)
        for message in self._messages:
            console.print(message, markup=False, highlight=False)
        console.print(table)
        drawn = HTML(console.export_html(inline_styles=True, code_format=_FORMAT))
        if self._handle is None:
            if self._overwrite:
                clear_output(wait=True)
            self._handle = display(drawn, display_id=True)
        else:
            self._handle.update(drawn)
