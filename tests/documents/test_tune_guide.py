"""The blocks of a guide to checkpoints of trials in Ray Tune, with the import line changed.

What the guide leaves out (a model, a training step) is filled in; what it shows is there as it stands.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keepstep import tune
from keepstep.errors import UsageError
from keepstep.tune import Checkpoint
from keepstep.tune.experiment import Trial
from keepstep.tune.result import SHOULD_CHECKPOINT, TRAINING_ITERATION


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide names no storage path: experiments go to the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class MyModel(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 1)


def checkpoint_names(result: tune.Result) -> list[str]:
    return sorted(path.name for path in Path(result.path).glob("checkpoint_*"))


def test_a_function_saves_and_loads_its_checkpoints(home: Path) -> None:
    def train_func(config: dict[str, Any]) -> None:
        start = 1
        my_model = MyModel()
        checkpoint = tune.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as checkpoint_dir:
                checkpoint_dict = torch.load(os.path.join(checkpoint_dir, "checkpoint.pt"))
                start = checkpoint_dict["epoch"] + 1
                my_model.load_state_dict(checkpoint_dict["model_state"])

        for epoch in range(start, config["epochs"] + 1):
            if epoch == 3 and start == 1:
                raise RuntimeError("the machine is taken away")
            metrics = {"metric": 1}
            with tempfile.TemporaryDirectory() as tempdir:
                torch.save(
                    {"epoch": epoch, "model_state": my_model.state_dict()},
                    os.path.join(tempdir, "checkpoint.pt"),
                )
                tune.report(metrics=metrics, checkpoint=Checkpoint.from_directory(tempdir))

    failures = tune.RunConfig(failure_config=tune.FailureConfig(max_failures=1))
    tuner = tune.Tuner(train_func, param_space={"epochs": 5}, run_config=failures)
    result_grid = tuner.fit()
    (result,) = result_grid
    assert result.error is None
    assert result.metrics[TRAINING_ITERATION] == 5
    assert checkpoint_names(result) == [f"checkpoint_00000{number}" for number in range(5)]
    assert Path(result.path).is_relative_to(home)


def test_a_function_saves_every_three_epochs() -> None:
    NUM_EPOCHS = 12
    CHECKPOINT_FREQ = 3

    def train_func(config: dict[str, Any]) -> None:
        for epoch in range(1, config["epochs"] + 1):
            metrics = {"metric": "my_metric"}
            if epoch % CHECKPOINT_FREQ == 0:
                with tempfile.TemporaryDirectory() as tempdir:
                    Path(tempdir, "epoch.json").write_text(json.dumps(epoch))
                    tune.report(metrics, checkpoint=Checkpoint.from_directory(tempdir))
            else:
                tune.report(metrics)

    tuner = tune.Tuner(train_func, param_space={"epochs": NUM_EPOCHS})
    (result,) = tuner.fit()
    assert len(checkpoint_names(result)) == 4
    assert result.metrics["metric"] == "my_metric"


class MyTrainableClass(tune.Trainable):
    def setup(self, config: dict[str, Any]) -> None:
        self.model = nn.Sequential(nn.Linear(config.get("input_size", 32), 32), nn.ReLU(), nn.Linear(32, 10))

    def step(self) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, tmp_checkpoint_dir: str) -> str:
        checkpoint_path = os.path.join(tmp_checkpoint_dir, "model.pth")
        torch.save(self.model.state_dict(), checkpoint_path)
        return tmp_checkpoint_dir

    def load_checkpoint(self, tmp_checkpoint_dir: str) -> None:
        checkpoint_path = os.path.join(tmp_checkpoint_dir, "model.pth")
        self.model.load_state_dict(torch.load(checkpoint_path))


def test_a_class_saves_every_two_iterations() -> None:
    tuner = tune.Tuner(
        MyTrainableClass,
        param_space={"input_size": 64},
        run_config=tune.RunConfig(
            stop={"training_iteration": 2},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=2),
        ),
    )
    (result,) = tuner.fit()
    (name,) = checkpoint_names(result)
    weights = torch.load(Path(result.path, name, "files", "model.pth"))
    assert weights["0.weight"].shape == (32, 64)


def detect_instance_preemption() -> bool:
    choice = random.randint(1, 100)
    return choice <= 1


def test_a_result_asks_for_a_checkpoint_when_the_instance_is_preempted() -> None:
    class Manual(MyTrainableClass):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            random.seed(1)  # 18, 73, 98: no preemption by chance, but the one of the second iteration

        def step(self) -> dict[str, Any]:
            result: dict[str, Any] = {"mean_accuracy": "my_accuracy"}
            if self.iteration == 1 or detect_instance_preemption():
                result.update(should_checkpoint=True)
            return result

    config = tune.CheckpointConfig(checkpoint_at_end=False)
    tuner = tune.Tuner(
        Manual, run_config=tune.RunConfig(stop={"training_iteration": 3}, checkpoint_config=config)
    )
    (result,) = tuner.fit()
    assert len(checkpoint_names(result)) == 1


class CheckpointByStepsTaken(tune.Callback):
    def __init__(self, iterations_per_checkpoint: int) -> None:
        self.steps_per_checkpoint = iterations_per_checkpoint
        self._trials_last_checkpoint: dict[Trial, int] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        current_iteration = result[TRAINING_ITERATION]
        if current_iteration - self._trials_last_checkpoint.get(trial, -1) >= self.steps_per_checkpoint:
            result[SHOULD_CHECKPOINT] = True
            self._trials_last_checkpoint[trial] = current_iteration


def test_a_callback_asks_for_checkpoints_by_the_steps_taken() -> None:
    tuner = tune.Tuner(
        MyTrainableClass,
        run_config=tune.RunConfig(
            stop={"training_iteration": 7},
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[CheckpointByStepsTaken(iterations_per_checkpoint=3)],
        ),
    )
    (result,) = tuner.fit()
    assert [metrics[TRAINING_ITERATION] for _, metrics in result.best_checkpoints or []] == [2, 5]


def test_a_frequency_of_ten_saves_nothing_in_two_iterations_but_at_the_end() -> None:
    tuner = tune.Tuner(
        MyTrainableClass,
        run_config=tune.RunConfig(
            stop={"training_iteration": 2},
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=10, checkpoint_at_end=True),
        ),
    )
    (result,) = tuner.fit()
    assert checkpoint_names(result) == ["checkpoint_000000"]


@pytest.mark.parametrize("said", [{"checkpoint_frequency": 10}, {"checkpoint_at_end": True}])
def test_the_matrix_of_what_functions_may_be_told(said: dict[str, Any]) -> None:
    config = tune.RunConfig(checkpoint_config=tune.CheckpointConfig(**said))
    with pytest.raises(UsageError, match="is for classes"):
        tune.Tuner(lambda config: None, run_config=config)
    for both in ({"num_to_keep": 2}, {"checkpoint_score_attribute": "a", "checkpoint_score_order": "min"}):
        tune.Tuner(
            lambda config: None,
            run_config=tune.RunConfig(checkpoint_config=tune.CheckpointConfig(**both)),  # type: ignore[arg-type]
        )
