"""Trainables by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepstep import tune
from keepstep.errors import UsageError
from keepstep.tune.registry import get_trainable_cls, register_trainable


def train(config: dict[str, Any]) -> None:
    tune.report({"loss": config["x"]})


class Trains(tune.Trainable):
    def step(self) -> dict[str, Any]:
        return {"loss": self.config["x"], "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "x").write_text("x")

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass


@pytest.mark.parametrize(("trainable", "executor"), [(train, "inline"), (Trains, "local")])
def test_a_registered_trainable_is_run_by_its_name_and_its_trials_have_it(
    tmp_path: Path, trainable: Any, executor: str
) -> None:
    tune.register_trainable("my_model", trainable)
    config = tune.RunConfig(storage_path=tmp_path, verbose=0, executor=executor)
    (result,) = tune.Tuner("my_model", param_space={"x": 3}, run_config=config).fit()
    assert result.metrics["loss"] == 3
    (experiment,) = tmp_path.iterdir()
    assert experiment.name.startswith("my_model_")
    assert Path(result.path).name.startswith("my_model_")
    assert tune.Tuner.restore(experiment, "my_model").fit().num_terminated == 1
    found = tune.run("my_model", config={"x": 4}, storage_path=tmp_path, verbose=0, name="run")
    assert [trial.last_result["loss"] for trial in found.trials] == [4]
    assert get_trainable_cls("my_model") is not trainable


def test_what_is_not_registered_is_told_with_what_is() -> None:
    register_trainable("known", train)
    with pytest.raises(UsageError, match=r"no trainable is registered by the name 'unknown'.*'known'"):
        tune.Tuner("unknown")
    with pytest.raises(UsageError, match="name"):
        tune.register_trainable("a/b", train)
    with pytest.raises(UsageError, match="as a trainable"):
        register_trainable("three", 3)
