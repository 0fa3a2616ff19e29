"""Where a checkpoint came from: versions, host, command line, git commit. No torch import."""

from __future__ import annotations

import functools
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["describe_environment"]

_GIT_TIMEOUT_S = 5.0


@functools.cache
def describe_environment() -> Mapping[str, Any]:
    """The environment of this process, found out once.

    Returns:
        JSON values: `python`, `torch`, `numpy`, `keepstep` (versions or None), `platform`, `host`,
        `command` (argv), `git` ({"commit", "dirty"} of the working directory, or None).
    """
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "keepstep": _version("keepstep"),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "world_size": 1,
        "command": list(sys.argv),
        "git": _git(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    commit = _run_git("rev-parse", "HEAD")
    if commit is None:
        return None
    status = _run_git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _run_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of files may be in any encoding
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
