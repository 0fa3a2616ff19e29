"""What trials report, written down: files in each trial's directory, and callbacks for trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepstep.lazy import lazy_names

if TYPE_CHECKING:
    from keepstep.tune.logger.base import CSVLoggerCallback as CSVLoggerCallback
    from keepstep.tune.logger.base import JsonLoggerCallback as JsonLoggerCallback
    from keepstep.tune.logger.base import LoggerCallback as LoggerCallback
    from keepstep.tune.logger.mlflow import MLflowLoggerCallback as MLflowLoggerCallback
    from keepstep.tune.logger.tensorboard import TBXLoggerCallback as TBXLoggerCallback
    from keepstep.tune.logger.wandb import WandbLoggerCallback as WandbLoggerCallback

_HOME_OF_NAME = {
    "CSVLoggerCallback": "keepstep.tune.logger.base",
    "JsonLoggerCallback": "keepstep.tune.logger.base",
    "LoggerCallback": "keepstep.tune.logger.base",
    "MLflowLoggerCallback": "keepstep.tune.logger.mlflow",
    "TBXLoggerCallback": "keepstep.tune.logger.tensorboard",
    "WandbLoggerCallback": "keepstep.tune.logger.wandb",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605
__getattr__, __dir__ = lazy_names(
    __name__,
    _HOME_OF_NAME,
    needs={extra: f"pip install 'keepstep[{extra}]'" for extra in ("mlflow", "tensorboard", "wandb")},
)
