"""Which reporter it is."""

from __future__ import annotations

import sys
from importlib import import_module

from keepstep.tune.reporting.base import ProgressReporter
from keepstep.tune.reporting.lines import LinesReporter, SilentReporter

__all__ = ["make_reporter"]


def make_reporter(verbose: int, given: ProgressReporter | None = None) -> ProgressReporter:
    """The reporter of an experiment.

    Args:
        verbose: 0: none.
        given: the user's own; it is taken whatever `verbose` says.

    Returns:
        In a notebook a table below the cell, in a terminal a live one, elsewhere one that writes lines.
    """
    if given is not None:
        return given
    if verbose <= 0:
        return SilentReporter()
    chosen: ProgressReporter
    if _in_notebook():
        chosen = import_module("keepstep.tune.reporting.notebook").JupyterNotebookReporter(overwrite=False)
        return chosen
    if sys.stdout is not None and sys.stdout.isatty():
        live = import_module("keepstep.tune.reporting.live").LiveReporter()
        chosen = live if live.is_usable else LinesReporter()
        return chosen
    return LinesReporter()


def _in_notebook() -> bool:
    """Whether a notebook's kernel runs this; its package may be imported elsewhere, too."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None
