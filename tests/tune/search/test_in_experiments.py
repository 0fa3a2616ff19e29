"""Searchers and stoppers within an experiment: begun, interrupted, restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from keepstep import tune
from keepstep.errors import KeepstepError, UsageError
from keepstep.tune.search import ConcurrencyLimiter, Repeater, Searcher
from keepstep.tune.search.optuna import OptunaSearch
from keepstep.tune.stopper import MaximumIterationStopper


def train(config: dict[str, Any]) -> None:
    for step in range(3):
        tune.report({"loss": (config["x"] - 0.3) ** 2 + 1 / (step + 1), "val": {"acc": config["x"]}})


def tuner(path: Path, space: dict[str, Any], run: dict[str, Any] | None = None, **more: Any) -> tune.Tuner:
    run_config = tune.RunConfig(
        **{"name": "it", "storage_path": path, "executor": "inline", "verbose": 0, **(run or {})}
    )
    return tune.Tuner(
        train,
        param_space=space,
        tune_config=tune.TuneConfig(**{"metric": "loss", "mode": "min", "seed": 3, **more}),
        run_config=run_config,
    )


def configs(results: tune.ResultGrid) -> list[dict[str, Any]]:
    return [result.config or {} for result in results]


class InterruptError(Exception):
    """Ends the driver, as if it had been killed there."""


class InterruptAt(tune.Callback):
    def __init__(self, results: int) -> None:
        self.left = results

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptError


SPACE = {"x": tune.uniform(0, 1), "net": {"act": tune.choice(["relu", "tanh"]), "depth": 2}}


@pytest.mark.parametrize(
    ("search_alg", "num_samples"),
    [
        (lambda: None, 8),
        (lambda: "optuna", 8),
        (lambda: OptunaSearch(sampler="cma-es"), 12),
        (lambda: ConcurrencyLimiter(Repeater(OptunaSearch(sampler="nsga-ii"), 2), 3, batch=True), 8),
    ],
    ids=["random", "optuna", "cma-es", "around"],
)
def test_a_restored_experiment_tries_what_an_undisturbed_one_tries(
    tmp_path: Path, search_alg: Any, num_samples: int
) -> None:
    more: dict[str, Any] = {"search_alg": search_alg(), "num_samples": num_samples}
    undisturbed = configs(tuner(tmp_path / "a", SPACE, **more).fit())
    assert len(undisturbed) == num_samples
    assert len({config["x"] for config in undisturbed}) > num_samples // 3

    more["search_alg"] = search_alg()
    with pytest.raises(InterruptError):
        tuner(tmp_path / "b", SPACE, {"callbacks": [InterruptAt(num_samples)]}, **more).fit()
    restored = configs(tune.Tuner.restore(str(tmp_path / "b" / "it"), train).fit())
    assert restored == undisturbed


class Walk(Searcher):
    """Written for Ray Tune: suggests a part of the configuration."""

    def __init__(self) -> None:
        super().__init__(metric="loss", mode="min")
        self.last: dict[str, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self.last[trial_id] = 0.1 * len(self.last)
        return {"x": self.last[trial_id], "net": {"act": "relu"}}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        assert result is not None


def test_a_searcher_of_ones_own_suggests_a_part_and_param_space_has_the_rest(tmp_path: Path) -> None:
    results = tuner(tmp_path, {"net": {"depth": 2}, "x": 9}, search_alg=Walk(), num_samples=3).fit()
    assert configs(results) == [{"net": {"depth": 2, "act": "relu"}, "x": 0.1 * at} for at in range(3)]
    assert "net" in (results[0].path or "") or "act=relu" in (results[0].path or "")
    with pytest.raises(KeepstepError, match=r"'more'.*Walk suggests no value"):
        tuner(tmp_path / "b", {"more": tune.uniform(0, 1)}, search_alg=Walk()).fit()


def test_grids_times_samples_ended_by_several_stoppers(tmp_path: Path) -> None:
    space = {"x": tune.grid_search([0.1, 0.9]), "y": tune.sample_from(lambda spec: spec.config.x * 2)}
    stop = [{"val/acc": 0.5}, MaximumIterationStopper(2)]
    results = tuner(tmp_path, space, {"stop": stop}, num_samples=2).fit()
    assert configs(results) == [{"x": x, "y": 2 * x} for x in (0.1, 0.9, 0.1, 0.9)]
    assert [result.metrics["training_iteration"] for result in results] == [2, 1, 2, 1]


def test_what_cannot_be_kept_has_to_be_handed_over_again(tmp_path: Path) -> None:
    space = {"x": tune.sample_from(lambda: 0.5)}
    stop = {"stop": lambda trial_id, result: False}
    tuner(tmp_path, space, stop).fit()
    with pytest.raises(UsageError, match=r"param_space.*'x'|stop"):
        tune.Tuner.restore(str(tmp_path / "it"), train).fit()
