"""Names of what stands in a result, as `ray.tune.result` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "AUTOMATIC_FIELDS",
    "CHECKPOINT_DIR_NAME",
    "DATE",
    "DEFAULT_METRIC",
    "DONE",
    "EXPERIMENT_TAG",
    "EXPR_ERROR_FILE",
    "EXPR_PARAM_FILE",
    "EXPR_PROGRESS_FILE",
    "EXPR_RESULT_FILE",
    "HOSTNAME",
    "ITERATIONS_SINCE_RESTORE",
    "NODE_IP",
    "PID",
    "SHOULD_CHECKPOINT",
    "TIMESTAMP",
    "TIME_SINCE_RESTORE",
    "TIME_THIS_ITER_S",
    "TIME_TOTAL_S",
    "TRAINING_ITERATION",
    "TRIAL_ID",
    "look_up",
]

SHOULD_CHECKPOINT: Final = "should_checkpoint"
"""True in a result: save a checkpoint now."""
DONE: Final = "done"
"""True in a result: the trial ends with it."""
DEFAULT_METRIC: Final = "_metric"
"""The metric of a function that returns or reports a bare number."""

TRIAL_ID: Final = "trial_id"
EXPERIMENT_TAG: Final = "experiment_tag"
TRAINING_ITERATION: Final = "training_iteration"
"""How many results a trial has reported, over all its restarts."""
TIME_THIS_ITER_S: Final = "time_this_iter_s"
TIME_TOTAL_S: Final = "time_total_s"
"""Seconds of training that led to this result; what was lost to a kill does not count."""
TIME_SINCE_RESTORE: Final = "time_since_restore"
ITERATIONS_SINCE_RESTORE: Final = "iterations_since_restore"
TIMESTAMP: Final = "timestamp"
"""Seconds since 1970."""
DATE: Final = "date"
PID: Final = "pid"
HOSTNAME: Final = "hostname"
NODE_IP: Final = "node_ip"
CHECKPOINT_DIR_NAME: Final = "checkpoint_dir_name"
"""The name of the checkpoint that was reported with this result; None: none was."""

AUTOMATIC_FIELDS: Final = (
    DONE,
    TRIAL_ID,
    EXPERIMENT_TAG,
    TRAINING_ITERATION,
    TIME_THIS_ITER_S,
    TIME_TOTAL_S,
    TIME_SINCE_RESTORE,
    ITERATIONS_SINCE_RESTORE,
    TIMESTAMP,
    DATE,
    PID,
    HOSTNAME,
    NODE_IP,
    CHECKPOINT_DIR_NAME,
)
"""What keepstep puts into every result by itself."""

EXPR_RESULT_FILE: Final = "result.json"
EXPR_PROGRESS_FILE: Final = "progress.csv"
EXPR_PARAM_FILE: Final = "params.json"
EXPR_ERROR_FILE: Final = "error.txt"


def look_up(result: Mapping[str, Any], name: str, missing: Any = None) -> Any:
    """The value of a metric in a result; nested ones by "a/b". `missing` if it is not there."""
    if name in result:
        return result[name]
    found: Any = result
    for part in name.split("/"):
        if not isinstance(found, Mapping) or part not in found:
            return missing
        found = found[part]
    return found
