"""What scripts import from `accelerate.tracking`. A tracker's package is imported with its class."""

from __future__ import annotations

from typing import Any

from keepstep.track.general import GeneralTracker, on_main_process
from keepstep.track.registry import (
    TRACKER_CLASSES,
    LoggerType,
    class_named,
    filter_trackers,
    get_available_trackers,
    register_tracker_class,
)

__all__ = [  # noqa: PLE0604
    "GeneralTracker",
    "LoggerType",
    "filter_trackers",
    "get_available_trackers",
    "on_main_process",
    "register_tracker_class",
    *TRACKER_CLASSES,
]


def __getattr__(name: str) -> Any:
    if name not in TRACKER_CLASSES:
        raise AttributeError(
            f"module 'keepstep.tracking' has no attribute {name!r}; it has: {', '.join(__all__)}"
        )
    return class_named(TRACKER_CLASSES[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
