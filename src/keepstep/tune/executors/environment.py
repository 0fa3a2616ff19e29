"""The environment of this process, for executors; no other part of them reads or writes it."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["changes_directory", "put", "variables", "visible_gpus"]


def variables() -> dict[str, str]:
    """The environment as it is now."""
    return dict(os.environ)


def visible_gpus() -> str | None:
    """What CUDA_VISIBLE_DEVICES says; None: it isn't set."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def changes_directory() -> bool:
    """Whether trials run in working directories of their own: RAY_CHDIR_TO_TRIAL_DIR is not "0"."""
    return os.environ.get("RAY_CHDIR_TO_TRIAL_DIR", "1") != "0"


def put(told: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set variables, or remove those that are None; returns what undoes that."""
    before = {name: os.environ.get(name) for name in told}
    for name, value in told.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before
