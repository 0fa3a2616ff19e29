"""The environment of the process that launches. No other part of launching reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["default_config_file", "says_debug", "variables"]

_DEBUG = ("KEEPSTEP_DEBUG_MODE", "ACCELERATE_DEBUG_MODE")


def variables() -> Mapping[str, str]:
    """The environment as it is now."""
    return dict(os.environ)


def default_config_file() -> Path:
    """Where the configuration lies that is used when no other is named.

    `$KEEPSTEP_HOME`, else `$XDG_CACHE_HOME/keepstep`, else `~/.cache/keepstep`.
    """
    home = os.environ.get("KEEPSTEP_HOME")
    if home:
        return Path(home).expanduser() / "default_config.yaml"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "keepstep" / "default_config.yaml"


def says_debug() -> bool:
    """Whether KEEPSTEP_DEBUG_MODE, or Accelerate's name for it, is on."""
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _DEBUG)
