"""Trainables without an experiment: classes, parameters, resources, what they refuse."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from keepstep import tune
from keepstep.errors import UsageError
from keepstep.tune.trainable.kinds import check_trainable, is_class_trainable, trainable_name
from keepstep.tune.trainable.resources import bundles_of, resources_of


def function(config: dict[str, Any]) -> None:
    """A trial."""


def with_data(config: dict[str, Any], data: Any) -> Any:
    return data


class Mine(tune.Trainable):
    def setup(self, config: dict[str, Any], data: Any = None) -> None:
        config["changed"] = True
        self.data, self.n, self.logged = data, 0, []

    def step(self) -> dict[str, Any]:
        self.n += 1
        return {"n": self.n} | self.config.get("says", {})

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "n.json").write_text(json.dumps(self.n))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.n = json.loads(Path(checkpoint, "n.json").read_text())

    def log_result(self, result: dict[str, Any]) -> None:
        self.logged.append(result)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return bool(new_config.get("resets", True))


def test_train_counts_and_fills_in_what_every_result_has() -> None:
    mine = Mine({"x": 1})
    assert mine.config == {"x": 1}  # setup() got a copy
    first, second = mine.train(), mine.train()
    assert (second["n"], second["training_iteration"], second["done"]) == (2, 2, False)
    assert (
        second["time_total_s"] == first["time_this_iter_s"] + second["time_this_iter_s"] == mine.time_total_s
    )
    assert second["iterations_since_restore"] == mine.iteration == mine.training_iteration == 2
    assert second["pid"] == os.getpid()
    assert {"trial_id", "date", "timestamp", "hostname", "node_ip", "time_since_restore"} < set(second)
    assert second["config"] == {"x": 1}
    assert mine.logged == [first, second]


def test_a_step_may_say_how_long_it_took_and_whether_it_is_done() -> None:
    result = Mine({"says": {"time_this_iter_s": 5.0, "done": True, "timestamp": 7}}).train()
    assert (result["time_this_iter_s"], result["time_total_s"], result["done"], result["timestamp"]) == (
        5.0,
        5.0,
        True,
        7,
    )


def test_a_class_saves_and_restores_outside_of_an_experiment(tmp_path: Path) -> None:
    mine = Mine()
    mine.train()
    mine.train()
    saved = mine.save(str(tmp_path / "here"))
    again = Mine()
    again.restore(saved)
    assert (again.n, again.iteration, again.time_total_s) == (2, 2, mine.time_total_s)
    other = Mine()
    other.restore(saved.checkpoint)
    assert other.train()["n"] == 3
    other.restore(saved.checkpoint.address or "")
    assert other.n == 2


def test_reset_starts_over_only_if_the_class_can() -> None:
    mine = Mine({"x": 1})
    mine.train()
    assert mine.reset({"x": 2})
    assert (mine.iteration, mine.config) == (0, {"x": 2})
    mine.train()
    assert not mine.reset({"resets": False})
    assert (mine.iteration, mine.config) == (1, {"x": 2})
    assert not tune.Trainable().reset({})


def test_outside_of_an_experiment_a_trial_is_called_default() -> None:
    mine = Mine()
    assert (mine.trial_id, mine.trial_name, mine.trial_resources) == ("default", "default", None)
    assert Path(mine.logdir).is_dir()
    assert mine.export_model("onnx") == {}
    with pytest.raises(NotImplementedError, match="override it"):
        tune.Trainable().train()
    with pytest.raises(UsageError, match=r"step\(\) returned None"):
        type("Bad", (tune.Trainable,), {"step": lambda self: None})().train()


def test_parameters_reach_functions_and_setup() -> None:
    data = [1, 2]
    assert tune.with_parameters(with_data, data=data)({}) is data
    bound = tune.with_parameters(Mine, data=data)
    assert bound({}).data is data
    assert Mine({}).data is None
    assert is_class_trainable(bound)
    assert trainable_name(bound) == "Mine"
    assert trainable_name(tune.with_parameters(with_data, data=1)) == "with_data"


def test_resources_are_told_by_wrappers_in_any_order_and_by_classes() -> None:
    half = {"cpu": 2, "gpu": 0.5}
    assert resources_of(function, {}) == {"cpu": 1.0}
    assert resources_of(tune.with_resources(function, half), {}) == {"cpu": 2.0, "gpu": 0.5}
    both = tune.with_parameters(tune.with_resources(with_data, half), data=1)
    assert resources_of(both, {}) == {"cpu": 2.0, "gpu": 0.5}
    assert both({}) == 1
    assert resources_of(tune.with_resources(tune.with_parameters(with_data, data=1), {"gpu": 1}), {}) == {
        "gpu": 1.0
    }
    by_config = tune.with_resources(Mine, lambda config: {"cpu": config["n"]})
    assert resources_of(tune.with_parameters(by_config, data=1), {"n": 3}) == {"cpu": 3.0}
    assert resources_of(Mine, {}) == {"cpu": 1.0}

    class Asks(Mine):
        @classmethod
        def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
            cpus = config.get("cpus", 2)
            return tune.PlacementGroupFactory([{"CPU": 1}, {"CPU": cpus, "licence": 1}], strategy="SPREAD")

    assert resources_of(Asks, {}) == {"cpu": 3.0, "licence": 1.0}
    assert bundles_of(Asks, {}).bundles == [{"CPU": 1.0}, {"CPU": 2.0, "licence": 1.0}]
    assert resources_of(tune.with_resources(Asks, half), {}) == {"cpu": 2.0, "gpu": 0.5}
    assert resources_of(tune.with_resources(function, {"cpu": 1, "custom_resources": {"a": 2}}), {}) == {
        "cpu": 1.0,
        "a": 2.0,
    }


def test_a_group_of_bundles_says_what_it_is_made_of() -> None:
    group = tune.PlacementGroupFactory([{}, {"CPU": 2}])
    assert group.head_bundle_is_empty
    assert group.head_cpus == 0
    assert group.required_resources == {"CPU": 2.0}
    assert group == tune.PlacementGroupFactory([{}, {"cpu": 2.0}]) != tune.PlacementGroupFactory([{"CPU": 2}])
    assert hash(group) == hash(tune.PlacementGroupFactory([{}, {"CPU": 2}]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cpu": -1}, "cpu=-1"),
        ({"gpu": 1.5}, "1.5 GPUs"),
        ({"cpu": "2"}, "cpu='2'"),
        ({"cpu": float("nan")}, "cpu=nan"),
        (3, "resources=3"),
    ],
)
def test_resources_that_cannot_be_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tune.with_resources(function, wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "a int, 3"),
        (dict, "the class"),
        (lambda: None, "configuration alone"),
        (with_data, "with_parameters"),
    ],
)
def test_what_is_no_trainable_is_refused(wrong: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_trainable(wrong)


def test_functions_of_any_make_are_trainables() -> None:
    check_trainable(functools.partial(with_data, data=1))
    check_trainable(lambda config, more=1: None)
    check_trainable(Mine)
    check_trainable(Mine().setup)
    assert trainable_name(lambda config: None) == "lambda"
    assert trainable_name(functools.partial(functools.partial(with_data), data=1)) == "with_data"
