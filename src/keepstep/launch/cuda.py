"""CUDA that was used before ranks were forked is refused; if somebody watched, with the line that did it."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Final

import torch

from keepstep.errors import UsageError

__all__ = ["refuse_used_cuda", "watch_cuda"]

_PACKAGES: Final = ("torch", "IPython", "ipykernel", "tornado", "asyncio", "keepstep")
"""Whose lines are not the user's; by where they lie, as a project's folder may have the same name."""

_initialized_at: list[str] = []
"""The lines that led to CUDA's initialization, if somebody watched."""


def _remember() -> None:
    _initialized_at[:] = [frame for frame in traceback.format_stack() if _is_the_users(frame)]


def _is_the_users(frame: str) -> bool:
    files = [getattr(sys.modules.get(package), "__file__", None) for package in _PACKAGES]
    return not any(f'"{Path(file).parent}/' in frame for file in files if file)


def watch_cuda() -> None:
    """Remember from now on which line initializes CUDA; torch calls back at that moment."""
    torch.cuda._lazy_call(_remember)  # type: ignore[no-untyped-call]


def refuse_used_cuda() -> None:
    """Refuse to fork a process that has used CUDA.

    Raises:
        UsageError: it has; the message tells the line, if somebody watched.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    message = (
        "CUDA was initialized in this process, and processes forked from it could not use it. Restart "
        "the notebook, and use no GPU (no .to('cuda'), no torch.cuda call that touches one) outside the "
        "training function."
    )
    if _initialized_at:
        raise UsageError(f"{message} It was initialized here:\n{''.join(_initialized_at)}")
    raise UsageError(
        f"{message} To be told which line it was, set KEEPSTEP_DEBUG_MODE=yes before the start, and import "
        "notebook_launcher from keepstep first."
    )
