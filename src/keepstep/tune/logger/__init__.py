"""What trials report, written down: files in each trial's directory, and callbacks for trackers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keepstep.errors import MissingPackageError

if TYPE_CHECKING:
    from keepstep.tune.logger.base import CSVLoggerCallback as CSVLoggerCallback
    from keepstep.tune.logger.base import JsonLoggerCallback as JsonLoggerCallback
    from keepstep.tune.logger.base import LoggerCallback as LoggerCallback
    from keepstep.tune.logger.mlflow import MLflowLoggerCallback as MLflowLoggerCallback
    from keepstep.tune.logger.tensorboard import TBXLoggerCallback as TBXLoggerCallback
    from keepstep.tune.logger.wandb import WandbLoggerCallback as WandbLoggerCallback

_HOME_OF_NAME = {
    "CSVLoggerCallback": "base",
    "JsonLoggerCallback": "base",
    "LoggerCallback": "base",
    "MLflowLoggerCallback": "mlflow",
    "TBXLoggerCallback": "tensorboard",
    "WandbLoggerCallback": "wandb",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF_NAME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    try:
        value = getattr(import_module(f"{__name__}.{home}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != home:
            raise
        raise MissingPackageError(
            f"{name} needs {home}, which is not installed: pip install 'keepstep[{home}]'"
        ) from None
    globals()[name] = value
    return value
