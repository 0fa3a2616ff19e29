"""Names that scripts import from `accelerate.utils`, each from where it lives."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME_OF_NAME = {
    "DataLoaderConfiguration": "keepstep.train.config",
    "DistributedType": "keepstep.train.process",
    "GradScalerKwargs": "keepstep.train.config",
    "GradientAccumulationPlugin": "keepstep.train.config",
    "ProjectConfiguration": "keepstep.train.config",
    "send_to_device": "keepstep.train.placement",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF_NAME.get(name)
    if home is None:
        raise AttributeError(
            f"module 'keepstep.utils' has no attribute {name!r}; it has: {', '.join(__all__)}"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
