"""Where a checkpoint came from: versions, host, command line, git commit. No torch import."""

from __future__ import annotations

import functools
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from keepstep.logins import without_logins

__all__ = ["describe_environment", "without_secrets"]

_SECRET_WORDS: Final = {"secret", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_TOKENS_OF: Final = {"", "access", "api", "auth", "bearer", "hf", "hub", "refresh", "session", "wandb"}
_KEYS_OF: Final = {"access", "account", "api", "private", "secret"}

_GIT_TIMEOUT_S = 5.0


@functools.cache
def describe_environment() -> Mapping[str, Any]:
    """The environment of this process, found out once.

    Returns:
        JSON values: `python`, `torch`, `numpy`, `keepstep` (versions or None), `platform`, `host`,
        `command` (argv, without what looks like a secret), `git` ({"commit", "dirty"} of the working
        directory, or None).
    """
    return {
        "python": platform.python_version(),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "keepstep": _version("keepstep"),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "world_size": 1,
        "command": without_secrets(sys.argv),
        "git": _git(),
    }


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line whose secrets are `***`: values of options that are named like one, logins in addresses.

    Args:
        command: as `sys.argv`; options as `--hf-token x`, `--password=x` or `aws.secret_key=x`.
    """
    shown: list[str] = []
    follows = False
    for word in command:
        name, equals, value = word.partition("=")
        named = _is_secret(name)
        if follows and not word.startswith("--"):
            shown.append("***")
        else:
            shown.append(f"{name}=***" if named and value else without_logins(word))
        follows = named and not equals and name.startswith("-")
    return shown


def _is_secret(option: str) -> bool:
    """`--aws-secret-access-key`, `--token` and `--hf_token` are; `--max-tokens` and `--pad-token` aren't."""
    words = [word for word in re.split(r"[^a-z0-9]+", option.lower()) if word]
    before, last = (words[-2] if len(words) > 1 else ""), (words[-1] if words else "")
    return (
        bool(_SECRET_WORDS & set(words))
        or (last == "token" and before in _TOKENS_OF)
        or (last == "key" and before in _KEYS_OF)
    )


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
