"""A progress bar that is shown once on each machine."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from keepstep.errors import MissingPackageError, UsageError
from keepstep.track import here

__all__ = ["tqdm"]


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """`tqdm.auto.tqdm`, shown by the first process of each machine only.

    Args:
        args: for `tqdm`.
        main_process_only: False shows one for every process.
        kwargs: for `tqdm`.

    Raises:
        MissingPackageError: tqdm is not installed.
        UsageError: the first argument is a bool, as an earlier signature had it.
    """
    if args and isinstance(args[0], bool):
        raise UsageError(f"tqdm({args[0]}, ...): pass it as main_process_only={args[0]}; the bar comes first")
    if find_spec("tqdm") is None:
        raise MissingPackageError("tqdm() needs tqdm, which is not installed: pip install 'keepstep[tqdm]'")
    hidden = bool(kwargs.pop("disable", False)) or (main_process_only and here.current().local_rank != 0)
    return import_module("keepstep.track.adapters.bar").Bar(*args, disable=hidden, **kwargs)
