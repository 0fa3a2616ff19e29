"""What people see while trials run."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keepstep.errors import MissingPackageError

if TYPE_CHECKING:
    from keepstep.tune.reporting.base import ProgressReporter as ProgressReporter
    from keepstep.tune.reporting.notebook import JupyterNotebookReporter as JupyterNotebookReporter
    from keepstep.tune.reporting.printed import CLIReporter as CLIReporter

_HOME_OF_NAME = {
    "CLIReporter": "printed",
    "JupyterNotebookReporter": "notebook",
    "ProgressReporter": "base",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF_NAME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    try:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "IPython":
            raise
        raise MissingPackageError(
            f"{name} needs IPython, which every notebook has and this Python has not; elsewhere use "
            "CLIReporter, or leave progress_reporter out"
        ) from None
    globals()[name] = value
    return value
