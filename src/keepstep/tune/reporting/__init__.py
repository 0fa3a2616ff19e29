"""What people see while trials run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepstep.lazy import lazy_names

if TYPE_CHECKING:
    from keepstep.tune.reporting.base import ProgressReporter as ProgressReporter
    from keepstep.tune.reporting.notebook import JupyterNotebookReporter as JupyterNotebookReporter
    from keepstep.tune.reporting.printed import CLIReporter as CLIReporter

_HOME_OF_NAME = {
    "CLIReporter": "keepstep.tune.reporting.printed",
    "JupyterNotebookReporter": "keepstep.tune.reporting.notebook",
    "ProgressReporter": "keepstep.tune.reporting.base",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605
__getattr__, __dir__ = lazy_names(
    __name__, _HOME_OF_NAME, needs={"IPython": "every notebook has it; elsewhere, use CLIReporter"}
)
