"""Trials as a journal would have them, without running any."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.records import ExperimentMade
from keepstep.tune.experiment.trial import CheckpointRecord, Trial


def make_trial(
    root: Path | str, number: int = 0, *, config: dict[str, Any] | None = None, **said: Any
) -> Trial:
    dirname = f"train_{number:05d}"
    config = {"lr": 0.1, "layer": {"width": number}} if config is None else config
    return Trial(
        trial_id=f"e1_{number:05d}",
        number=number,
        trainable_name="train",
        config=config,
        evaluated_params={"lr": config.get("lr", 0.1)},
        experiment_tag=f"{number}_lr={config.get('lr')}",
        dirname=dirname,
        path=f"{root}/{dirname}",
        resources={"cpu": 1.0},
        **said,
    )


def make_result(trial: Trial, iteration: int, **metrics: Any) -> dict[str, Any]:
    """A result with automatic fields, and the trial has it."""
    trial.last_result = {
        **metrics,
        "done": False,
        "trial_id": trial.trial_id,
        "experiment_tag": trial.experiment_tag,
        "training_iteration": iteration,
        "time_this_iter_s": 0.5,
        "time_total_s": 0.5 * iteration,
        "timestamp": 1.8e9 + iteration,
        "date": time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime(1.8e9 + iteration)),
        "pid": 1,
        "hostname": "h",
        "node_ip": "127.0.0.1",
        "checkpoint_dir_name": None,
    }
    trial.iteration = iteration
    trial.time_total_s = 0.5 * iteration
    return trial.last_result


def make_checkpoint(trial: Trial, number: int, iteration: int, **metrics: Any) -> CheckpointRecord:
    made = CheckpointRecord(
        trial_id=trial.trial_id,
        name=f"checkpoint_{number:06d}",
        iteration=iteration,
        time_total_s=0.5 * iteration,
        bytes=1000,
        metrics=metrics,
    )
    trial.checkpoints.append(made)
    return made


def make_history(root: Path | str, trials: list[Trial]) -> History:
    made = ExperimentMade(time=1.8e9, id="e1", name="e", trainable="train", seed=1, spec={})
    history = History(made, str(root))
    history.trials.update({trial.trial_id: trial for trial in trials})
    return history
