"""keepstep.tune: many trials, none of which loses progress. The names are those of `ray.tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepstep.lazy import lazy_names

if TYPE_CHECKING:
    from keepstep.errors import TuneError as TuneError
    from keepstep.tune import callback as callback
    from keepstep.tune import experiment as experiment
    from keepstep.tune import logger as logger
    from keepstep.tune import registry as registry
    from keepstep.tune import result as result
    from keepstep.tune import schedulers as schedulers
    from keepstep.tune import search as search
    from keepstep.tune import stopper as stopper
    from keepstep.tune.analysis import ExperimentAnalysis as ExperimentAnalysis
    from keepstep.tune.callback import Callback as Callback
    from keepstep.tune.checkpoint import Checkpoint as Checkpoint
    from keepstep.tune.logger.base import CSVLoggerCallback as CSVLoggerCallback
    from keepstep.tune.logger.base import JsonLoggerCallback as JsonLoggerCallback
    from keepstep.tune.logger.base import LoggerCallback as LoggerCallback
    from keepstep.tune.logger.mlflow import MLflowLoggerCallback as MLflowLoggerCallback
    from keepstep.tune.logger.tensorboard import TBXLoggerCallback as TBXLoggerCallback
    from keepstep.tune.logger.wandb import WandbLoggerCallback as WandbLoggerCallback
    from keepstep.tune.registry import register_trainable as register_trainable
    from keepstep.tune.reporting.base import ProgressReporter as ProgressReporter
    from keepstep.tune.reporting.notebook import JupyterNotebookReporter as JupyterNotebookReporter
    from keepstep.tune.reporting.printed import CLIReporter as CLIReporter
    from keepstep.tune.results import Result as Result
    from keepstep.tune.results import ResultGrid as ResultGrid
    from keepstep.tune.run_function import run as run
    from keepstep.tune.schedulers.registry import create_scheduler as create_scheduler
    from keepstep.tune.search.create import create_searcher as create_searcher
    from keepstep.tune.search.sample import choice as choice
    from keepstep.tune.search.sample import lograndint as lograndint
    from keepstep.tune.search.sample import loguniform as loguniform
    from keepstep.tune.search.sample import qlograndint as qlograndint
    from keepstep.tune.search.sample import qloguniform as qloguniform
    from keepstep.tune.search.sample import qrandint as qrandint
    from keepstep.tune.search.sample import qrandn as qrandn
    from keepstep.tune.search.sample import quniform as quniform
    from keepstep.tune.search.sample import randint as randint
    from keepstep.tune.search.sample import randn as randn
    from keepstep.tune.search.sample import sample_from as sample_from
    from keepstep.tune.search.sample import uniform as uniform
    from keepstep.tune.search.space import grid_search as grid_search
    from keepstep.tune.settings import CheckpointConfig as CheckpointConfig
    from keepstep.tune.settings import FailureConfig as FailureConfig
    from keepstep.tune.settings import RunConfig as RunConfig
    from keepstep.tune.settings import TuneConfig as TuneConfig
    from keepstep.tune.stopper import Stopper as Stopper
    from keepstep.tune.trainable.bundles import PlacementGroupFactory as PlacementGroupFactory
    from keepstep.tune.trainable.parameters import with_parameters as with_parameters
    from keepstep.tune.trainable.resources import with_resources as with_resources
    from keepstep.tune.trainable.session import TuneContext as TuneContext
    from keepstep.tune.trainable.session import get_checkpoint as get_checkpoint
    from keepstep.tune.trainable.session import get_context as get_context
    from keepstep.tune.trainable.session import report as report
    from keepstep.tune.trainable.trainable import Trainable as Trainable
    from keepstep.tune.tuner import Tuner as Tuner

_MODULES = ("callback", "experiment", "logger", "registry", "result", "schedulers", "search", "stopper")
_HOME_OF_NAME = {
    "CLIReporter": "keepstep.tune.reporting",
    "CSVLoggerCallback": "keepstep.tune.logger",
    "Callback": "keepstep.tune.callback",
    "Checkpoint": "keepstep.tune.checkpoint",
    "CheckpointConfig": "keepstep.tune.settings",
    "ExperimentAnalysis": "keepstep.tune.analysis",
    "FailureConfig": "keepstep.tune.settings",
    "JsonLoggerCallback": "keepstep.tune.logger",
    "JupyterNotebookReporter": "keepstep.tune.reporting",
    "LoggerCallback": "keepstep.tune.logger",
    "MLflowLoggerCallback": "keepstep.tune.logger",
    "PlacementGroupFactory": "keepstep.tune.trainable.bundles",
    "ProgressReporter": "keepstep.tune.reporting",
    "Result": "keepstep.tune.results",
    "ResultGrid": "keepstep.tune.results",
    "RunConfig": "keepstep.tune.settings",
    "Stopper": "keepstep.tune.stopper",
    "TBXLoggerCallback": "keepstep.tune.logger",
    "Trainable": "keepstep.tune.trainable.trainable",
    "TuneConfig": "keepstep.tune.settings",
    "TuneContext": "keepstep.tune.trainable.session",
    "TuneError": "keepstep.errors",
    "Tuner": "keepstep.tune.tuner",
    "WandbLoggerCallback": "keepstep.tune.logger",
    "choice": "keepstep.tune.search.sample",
    "create_scheduler": "keepstep.tune.schedulers.registry",
    "create_searcher": "keepstep.tune.search.create",
    "get_checkpoint": "keepstep.tune.trainable.session",
    "get_context": "keepstep.tune.trainable.session",
    "grid_search": "keepstep.tune.search.space",
    "lograndint": "keepstep.tune.search.sample",
    "loguniform": "keepstep.tune.search.sample",
    "qlograndint": "keepstep.tune.search.sample",
    "qloguniform": "keepstep.tune.search.sample",
    "qrandint": "keepstep.tune.search.sample",
    "qrandn": "keepstep.tune.search.sample",
    "quniform": "keepstep.tune.search.sample",
    "randint": "keepstep.tune.search.sample",
    "randn": "keepstep.tune.search.sample",
    "register_trainable": "keepstep.tune.registry",
    "report": "keepstep.tune.trainable.session",
    "run": "keepstep.tune.run_function",
    "sample_from": "keepstep.tune.search.sample",
    "uniform": "keepstep.tune.search.sample",
    "with_parameters": "keepstep.tune.trainable.parameters",
    "with_resources": "keepstep.tune.trainable.resources",
}

__all__ = sorted([*_HOME_OF_NAME, *_MODULES])  # noqa: PLE0605
__getattr__, __dir__ = lazy_names(
    __name__, _HOME_OF_NAME, modules=[f"{__name__}.{module}" for module in _MODULES]
)
