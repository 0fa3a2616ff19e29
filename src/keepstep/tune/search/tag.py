"""A trial's number and what was drawn for it, as a name: "0_lr=0.1000,width=3"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

__all__ = ["experiment_tag"]

_MOST: Final = 100
"""Characters; a name of a file may have 255 bytes, and others put something before and after."""


def experiment_tag(number: int, evaluated: Mapping[str, Any]) -> str:
    """A name for a trial that can be a directory's on every system: letters, digits and `_-=,.` alone.

    Args:
        number: of the trial, which makes the name unique.
        evaluated: {path: value}; of a path its last key is shown, and all of it if others end alike.

    Returns:
        At most 100 characters; what does not fit is left out, from the end.
    """
    last = {path: _last_key(path) for path in evaluated}
    often = Counter(last.values())
    tag = str(number)
    for at, (path, value) in enumerate(sorted(evaluated.items())):
        name = last[path] if often[last[path]] == 1 else _clean(path)
        part = f"{'_' if at == 0 else ','}{name}={_shown(value)}"
        if len(tag) + len(part) > _MOST:
            break
        tag += part
    return tag


def _last_key(path: str) -> str:
    """Of "net/layers/0": "layers_0"."""
    keys = path.split("/")
    named = next((at for at in range(len(keys) - 1, -1, -1) if not keys[at].isdigit()), 0)
    return _clean("_".join(keys[named:]))


def _clean(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_-]+", "_", text).strip("_")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        plain = value == 0 or 1e-3 <= abs(value) < 1e6
        return (f"{value:.4f}" if plain else f"{value:.3g}").replace("+", "")
    return _clean(str(value))[:40]
