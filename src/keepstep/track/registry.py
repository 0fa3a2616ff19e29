"""Names of trackers -> classes. A tracker's module, and its package, is imported when it is asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from keepstep.errors import MissingPackageError, UsageError
from keepstep.track.general import GeneralTracker

__all__ = [
    "NOT_HERE",
    "LoggerType",
    "class_named",
    "filter_trackers",
    "get_available_trackers",
    "known_names",
    "register_tracker_class",
    "resolve",
]

_log = logging.getLogger(__name__)


class LoggerType(StrEnum):
    """Trackers that have a name. `ALL` stands for every one whose package is installed."""

    ALL = "all"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    MLFLOW = "mlflow"
    COMETML = "comet_ml"
    CSV = "csv"
    JSONL = "jsonl"
    AIM = "aim"
    CLEARML = "clearml"
    DVCLIVE = "dvclive"
    SWANLAB = "swanlab"
    TRACKIO = "trackio"


@dataclass(frozen=True)
class _Adapter:
    """Where a tracker's class is.

    Attributes:
        module: below `keepstep.track.adapters`.
        kind: name of the class.
        package: that it needs besides keepstep; "" for none.
        extra: of keepstep, that installs the package.
    """

    module: str
    kind: str
    package: str = ""
    extra: str = ""


_ADAPTERS = {
    "tensorboard": _Adapter("tensorboard", "TensorBoardTracker", "tensorboard", "tensorboard"),
    "wandb": _Adapter("wandb", "WandBTracker", "wandb", "wandb"),
    "mlflow": _Adapter("mlflow", "MLflowTracker", "mlflow", "mlflow"),
    "comet_ml": _Adapter("comet", "CometMLTracker", "comet_ml", "comet"),
    "csv": _Adapter("csv", "CSVTracker"),
    "jsonl": _Adapter("jsonl", "JSONLTracker"),
}
NOT_HERE = ("aim", "clearml", "dvclive", "swanlab", "trackio")
"""Trackers of Accelerate's that keepstep has not."""
_registered: dict[str, type[GeneralTracker]] = {}

TRACKER_CLASSES = {adapter.kind: name for name, adapter in _ADAPTERS.items()}
"""{name of a class: name of its tracker}."""


def get_available_trackers() -> list[LoggerType]:
    """Trackers whose packages are installed; those that need none are left out, as are one's own."""
    return [
        LoggerType(name)
        for name, adapter in _ADAPTERS.items()
        if adapter.package and _is_installed(adapter.package)
    ]


def known_names() -> list[str]:
    """Every name that `log_with` may hold."""
    return [*_ADAPTERS, *_registered, "all"]


def register_tracker_class(tracker_class: type[GeneralTracker]) -> None:
    """Make a tracker class of one's own known by its `name`, for `log_with`.

    It is made with the project's name as its first argument, the logging directory as its second if it
    requires one, and what `init_kwargs` holds for it as keywords.

    Raises:
        UsageError: it is no such class, or lacks a name or `requires_logging_directory`.
    """
    if not (isinstance(tracker_class, type) and issubclass(tracker_class, GeneralTracker)):
        raise UsageError(
            f"register_tracker_class() takes a class derived from GeneralTracker; it was given "
            f"{tracker_class!r:.100}"
        )
    name = getattr(tracker_class, "name", None)
    if not isinstance(name, str) or not name or not hasattr(tracker_class, "requires_logging_directory"):
        raise UsageError(
            f"{tracker_class.__name__} must have a `name`, a string that is not empty, and "
            f"`requires_logging_directory`, True or False, in the class; its name is {name!r}"
        )
    if name in _ADAPTERS or _registered.get(name, tracker_class) is not tracker_class:
        _log.warning("The tracker %r is replaced by %s", name, tracker_class.__qualname__)
    _registered[name] = tracker_class


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # wandb/ where wandb writes is no package


def class_named(name: str) -> type[GeneralTracker]:
    """The class of a tracker.

    Raises:
        MissingPackageError: the package that it needs is not installed.
        UsageError: there is no tracker of that name.
    """
    _check(name)
    if name in _registered:
        return _registered[name]
    adapter = _ADAPTERS[name]
    kind: type[GeneralTracker] = getattr(
        import_module(f"keepstep.track.adapters.{adapter.module}"), adapter.kind
    )
    return kind


def _check(name: str) -> None:
    """Refuse what is no tracker, or can't be imported."""
    if name in _registered:
        return
    if name in NOT_HERE:
        raise UsageError(
            f"log_with={name!r}: keepstep has no tracker for {name}. Derive one from "
            "keepstep.tracking.GeneralTracker (docs/tracking.md shows one of 15 lines) and pass an instance "
            f"as log_with, or use one of: {', '.join(known_names())}"
        )
    adapter = _ADAPTERS.get(name)
    if adapter is None:
        raise UsageError(f"log_with={name!r} names no tracker; there are: {', '.join(known_names())}")
    if adapter.package and not _is_installed(adapter.package):
        raise MissingPackageError(
            f"the tracker {name!r} needs {adapter.package}, which is not installed: pip install "
            f"'keepstep[{adapter.extra}]'"
        )


def resolve(
    log_with: Any, *, logging_dir: str | os.PathLike[str] | None, is_main: bool
) -> dict[str, type[GeneralTracker] | GeneralTracker | None]:
    """What `log_with` asks for, by name: classes, and instances as they are; None where this rank has none.

    A rank on which a tracker has nothing to do doesn't import its package, but refuses what the others do.

    Args:
        log_with: a name, a `LoggerType`, a tracker, or a list of these; None for none.
        logging_dir: where those write that require a directory.
        is_main: whether this is the main process.

    Raises:
        MissingPackageError: a tracker was named whose package is not installed.
        UsageError: an unknown name, or a directory is missing.
    """
    found: dict[str, type[GeneralTracker] | GeneralTracker | None] = {}
    for item in log_with if isinstance(log_with, list | tuple | set) else [log_with]:
        if isinstance(item, GeneralTracker):
            found[item.name] = item
        elif isinstance(item, str):
            for name in _spelled_out(str(item)):
                _check(name)
                found.setdefault(name, class_named(name) if is_main or name in _registered else None)
        elif item is not None:
            raise UsageError(
                f"log_with holds {item!r:.100} ({type(item).__name__}); allowed are names "
                f"({', '.join(known_names())}), LoggerType, and instances of GeneralTracker"
            )
    for name, tracker in found.items():
        if isinstance(tracker, type) and tracker.requires_logging_directory and logging_dir is None:
            raise UsageError(
                f"log_with={name!r} needs a directory to write to, and the Accelerator has neither a "
                "logging_dir nor a project_dir on a disk. Pass Accelerator(project_dir=...) or "
                "ProjectConfiguration(logging_dir=...)"
            )
    return {
        name: tracker if is_main or not getattr(tracker, "main_process_only", True) else None
        for name, tracker in found.items()
    }


def filter_trackers(
    log_with: Any, logging_dir: str | os.PathLike[str] | None = None
) -> list[str | GeneralTracker]:
    """What `log_with` asks for, each once: names, and instances as they are.

    Args:
        log_with: as for `Accelerator`.
        logging_dir: where those write that require a directory.

    Raises:
        MissingPackageError, UsageError: as for `Accelerator`; nothing is left out in silence.
    """
    found = resolve(log_with, logging_dir=logging_dir, is_main=True)
    return [tracker if isinstance(tracker, GeneralTracker) else name for name, tracker in found.items()]


def _spelled_out(name: str) -> Iterable[str]:
    return [str(found) for found in get_available_trackers()] if name == "all" else [name]
