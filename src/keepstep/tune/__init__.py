"""keepstep.tune: many trials, none of which loses progress. The names are those of `ray.tune`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keepstep.tune.checkpoint import Checkpoint as Checkpoint

_HOME_OF_NAME = {
    "Checkpoint": "keepstep.tune.checkpoint",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF_NAME.get(name)
    if home is None:
        raise AttributeError(
            f"module 'keepstep.tune' has no attribute {name!r}; it has: {', '.join(__all__)}"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
