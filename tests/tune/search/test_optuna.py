"""`OptunaSearch`: spaces, points, outcomes; and each sampler suggests the same again after a restart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from keepstep.errors import UsageError
from keepstep.tune.result import DEFAULT_METRIC, TRAINING_ITERATION
from keepstep.tune.search.description import described, revived
from keepstep.tune.search.optuna import OptunaSearch
from keepstep.tune.search.sample import (
    choice,
    lograndint,
    loguniform,
    qlograndint,
    qloguniform,
    qrandint,
    quniform,
    randint,
    randn,
    sample_from,
    uniform,
)
from keepstep.tune.search.space import grid_search

SPACE = {
    "lr": loguniform(1e-4, 1e-1),
    "net": {"width": randint(1, 9), "act": choice(["relu", "tanh"])},
    "fixed": [1, 2],
    "twice": sample_from(lambda spec: spec.config.net.width * 2),
}


def search(param_space: Any = None, *, drawn_with: int = 5, **arguments: Any) -> OptunaSearch:
    made = OptunaSearch(**{"metric": "loss", "mode": "min", **arguments})
    made.set_seed(drawn_with)
    made.set_search_properties(None, None, SPACE if param_space is None else param_space, num_samples=10)
    return made


def loss_of(config: dict[str, Any]) -> float:
    return float((math.log10(config["lr"]) + 2) ** 2 + abs(config["net"]["width"] - 4) / 10)


def lived(
    searcher: OptunaSearch, trials: int, *, loss: Callable[[dict[str, Any]], Any] = loss_of
) -> list[Any]:
    """Two trials at a time, with results in between; some fail."""
    running: list[tuple[str, dict[str, Any]]] = []
    found = []
    for at in range(trials):
        config = searcher.suggest(f"t{at}")
        assert isinstance(config, dict)
        found.append(config)
        running.append((f"t{at}", config))
        searcher.on_trial_result(f"t{at}", {"loss": loss(config) + 1, TRAINING_ITERATION: 1})
        if len(running) == 2:
            trial_id, ended = running.pop(0)
            failed = at % 7 == 3
            value = loss(ended)
            result = value if isinstance(value, dict) else {"loss": value}
            searcher.on_trial_complete(trial_id, None if failed else result, error=failed)
    return found


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cma-es", "qmc", "nsga-ii", "random"])
def test_asked_and_told_the_same_a_new_object_suggests_the_same(sampler: str) -> None:
    trials = 14 if sampler == "gp" else 60
    arguments = {"sampler": sampler}
    first = lived(search(**arguments), trials)
    assert lived(search(**arguments), trials) == first
    anew = revived(
        json.loads(json.dumps(described(OptunaSearch(metric="loss", mode="min", sampler=sampler))))
    )
    anew.set_seed(5)
    anew.set_search_properties(None, None, SPACE)
    assert lived(anew, trials // 2) == first[: trials // 2]
    assert lived(search(drawn_with=6, **arguments), 5) != first[:5]


def test_a_sampler_that_is_an_object_is_used_as_it_is_and_copied() -> None:
    sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=3, multivariate=True)
    first = lived(search(sampler=sampler), 20)
    assert lived(search(drawn_with=99, sampler=sampler), 20) == first
    with pytest.raises(UsageError, match=r"'sampler' \(optuna.*TPESampler\).*hand over search_alg again"):
        revived(described(search(sampler=sampler)), argument="search_alg")


def test_a_sampler_that_walks_through_a_grid_comes_to_an_end() -> None:
    searcher = search({"a": choice([1, 2, 3])}, sampler=optuna.samplers.GridSampler({"a": [1, 2, 3]}, seed=1))
    tried = []
    while isinstance(config := searcher.suggest(str(len(tried))), dict):
        searcher.on_trial_complete(str(len(tried)), {"loss": 1.0})
        tried.append(config["a"])
    assert sorted(tried) == [1, 2, 3]
    assert searcher.suggest("more") == OptunaSearch.FINISHED


def test_it_learns() -> None:
    found = lived(search(sampler="tpe"), 40)
    early, late = (sum(map(loss_of, some)) / len(some) for some in (found[:10], found[-10:]))
    assert late < early / 2


def test_values_keep_to_the_bounds_of_the_space() -> None:
    space = {
        "i": randint(0, 3),
        "qi": qrandint(1, 11, 5),
        "li": lograndint(1, 4),
        "qli": qlograndint(1, 20, 5),
        "q": quniform(0, 1, 0.25),
        "ql": qloguniform(0.1, 0.5, 0.1),
        "u": uniform(-1, 1),
        "c": choice([[1, 2], {"deep": uniform(5, 6), "wide": choice([1, True])}, None]),
        "l": [choice([1])],
    }
    searcher = search(space, sampler="random")
    seen: dict[str, set[Any]] = {}
    for at in range(150):
        config = searcher.suggest(str(at))
        assert isinstance(config, dict)
        for key, value in config.items():
            seen.setdefault(key, set()).add(repr(value))
        if isinstance(config["c"], dict):
            assert 5 <= config["c"]["deep"] <= 6
            assert searcher.evaluated(str(at))["c/deep"] == config["c"]["deep"]
    assert seen["i"] == {"0", "1", "2"}
    assert seen["qi"] == {"5", "10"}
    assert seen["li"] == {"1", "2", "3"}
    assert seen["qli"] == {"5", "10", "15", "20"}
    assert seen["q"] == {"0.0", "0.25", "0.5", "0.75", "1.0"}
    assert seen["ql"] == {repr(k * 0.1) for k in range(1, 6)}
    assert {"[1, 2]", "None"} < seen["c"]
    assert seen["l"] == {"[1]"}


def test_functions_constants_and_what_was_drawn() -> None:
    searcher = search()
    config = searcher.suggest("a")
    assert isinstance(config, dict)
    assert list(config) == list(SPACE)
    assert config["twice"] == 2 * config["net"]["width"]
    assert config["fixed"] == [1, 2]
    assert searcher.evaluated("a") == {
        "lr": config["lr"],
        "net/width": config["net"]["width"],
        "net/act": config["net"]["act"],
        "twice": config["twice"],
    }


def test_a_space_of_optunas_own() -> None:
    space = {
        "lr": FloatDistribution(1e-3, 1e-1, log=True),
        "net": {"width": IntDistribution(1, 3)},
        "net/act": CategoricalDistribution(["relu"]),
    }
    config = search({"net": {"depth": 2}, "c": 1}, space=space).suggest("a")
    assert isinstance(config, dict)
    assert config["net"].keys() == {"width", "act"}
    with pytest.raises(UsageError, match=r"'b'; expected optuna\.distributions"):
        search({}, space={"a": IntDistribution(1, 2), "b": 3})


def test_a_function_defines_the_space_by_running() -> None:
    def define(trial: optuna.Trial) -> dict[str, Any]:
        if trial.suggest_categorical("opt/name", ["sgd", "adam"]) == "sgd":
            trial.suggest_float("opt/momentum", 0, 1)
        return {"epochs": 3}

    searcher = search({"c": 1}, space=define)
    found = [searcher.suggest(str(at)) for at in range(20)]
    assert all(isinstance(one, dict) and one["epochs"] == 3 for one in found)
    assert {("momentum" in one["opt"]) for one in found if isinstance(one, dict)} == {True, False}
    with pytest.raises(UsageError, match="returned 3"):
        search({}, space=lambda trial: 3).suggest("a")


def test_points_are_tried_first_complete_or_in_part() -> None:
    points = [{"lr": 0.01, "net": {"width": 3, "act": "tanh"}}, {"net/width": 8}, {"fixed": [1, 2]}]
    searcher = search(points_to_evaluate=points)
    first, second, third = (searcher.suggest(name) for name in "abc")
    assert first == {"lr": 0.01, "net": {"width": 3, "act": "tanh"}, "fixed": [1, 2], "twice": 6}
    assert isinstance(second, dict)
    assert second["net"]["width"] == 8
    assert isinstance(third, dict)


def test_points_that_were_evaluated_are_only_learned_from() -> None:
    points = [{"lr": 10**-k, "net": {"width": 4, "act": "relu"}} for k in (1, 2, 3)]
    searcher = search(points_to_evaluate=points, evaluated_rewards=[1.0, 0.0, 1.0])
    assert searcher.suggest("a")
    assert searcher._study is not None
    assert searcher._study.best_value == 0.0
    assert searcher._study.best_params["lr"] == 0.01


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"points_to_evaluate": [{"lrr": 1}]}, r"points_to_evaluate\[0\] has 'lrr'"),
        ({"points_to_evaluate": [{"lr": 7.0}]}, "lr=7.0, which that variable never is"),
        ({"points_to_evaluate": [{"net": {"act": "gelu"}}]}, "net/act='gelu'"),
        ({"points_to_evaluate": [{"net": {"width": 9}}]}, "net/width=9"),
        ({"points_to_evaluate": [{"fixed": 3}]}, "always"),
        ({"points_to_evaluate": [{"lr": 0.1}], "evaluated_rewards": [1]}, "says nothing of 'net/width'"),
        ({"points_to_evaluate": [{}], "evaluated_rewards": [1, 2]}, "2 evaluated_rewards for 1"),
        ({"sampler": "anneal"}, '"cma-es"'),
        ({"storage": "sqlite:///x.db"}, "journal holds its history"),
        ({"seed": 1, "sampler": optuna.samplers.RandomSampler(seed=2)}, "give the seed to the sampler"),
        ({"metric": ["a", "b"], "mode": "min"}, "two lists of one length"),
        ({"metric": ["a"], "mode": ["up"]}, "two lists of one length"),
        ({"mode": "up"}, 'expected "min" or "max"'),
        ({"mode": None}, "has to know its mode"),
        ({"space": 3}, "expected a dict or a function"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        search(**arguments)


def test_spaces_that_optuna_cannot_draw_are_refused() -> None:
    for space, says in (
        ({"g": grid_search([1])}, "a grid at 'g', .*; use choice"),
        ({"n": {"x": randn()}}, "'n/x'"),
        ({"c": 1}, "nothing to search"),
    ):
        with pytest.raises(UsageError, match=says):
            search(space)


def test_outcomes_reach_optuna_as_what_they_are() -> None:
    searcher = search()
    results: list[tuple[dict[str, Any] | None, bool]] = [
        ({"loss": 0.5}, False),
        (None, True),
        ({"loss": math.nan}, False),
        ({"other": 1}, False),
        (None, False),
    ]
    for at, (result, error) in enumerate(results):
        searcher.suggest(str(at))
        if at == 4:
            searcher.on_trial_result("4", {"loss": 2.0, TRAINING_ITERATION: 3})
            searcher.on_trial_result("4", {"loss": 9.0, TRAINING_ITERATION: 2})  # went back: counts once
        searcher.on_trial_complete(str(at), result, error)
        searcher.on_trial_complete(str(at), {"loss": 77.0})
    searcher.on_trial_result("never", {"loss": 1})
    assert searcher._study is not None
    trials = searcher._study.trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "FAIL", "FAIL", "PRUNED"]
    assert trials[0].value == 0.5
    assert trials[4].intermediate_values == {3: 2.0}
    assert len(searcher.messages) == 2
    assert "loss=nan" in searcher.messages[0]


def test_several_objectives_and_nested_metrics() -> None:
    space = {"x": uniform(0, 1), "y": uniform(0, 1)}
    searcher = search(space, metric=["val/a", "b"], mode=["min", "max"], sampler="nsga-ii")
    assert searcher.objectives == ("val/a", "b")
    assert searcher.metric is None
    for at in range(60):
        config = searcher.suggest(str(at))
        assert isinstance(config, dict)
        searcher.on_trial_result(str(at), {"val": {"a": 1.0}, "b": 0.0, TRAINING_ITERATION: 1})
        searcher.on_trial_complete(str(at), {"val": {"a": config["x"]}, "b": config["x"] - config["y"] ** 2})
    assert searcher._study is not None
    assert len(searcher._study.best_trials) >= 1
    with pytest.raises(UsageError, match="none of them"):
        searcher.set_search_properties("c", None, space)
    known = search(
        space,
        metric=["a", "b"],
        mode=["min", "max"],
        points_to_evaluate=[{"x": 0.1, "y": 0}],
        evaluated_rewards=[[1, 2]],
    )
    assert known._study is not None
    assert known._study.best_trials[0].values == [1, 2]


def test_metric_and_mode_come_from_the_experiment_or_the_bare_number() -> None:
    searcher = OptunaSearch()
    searcher.set_search_properties("acc", "max", SPACE)
    assert searcher.objectives == ("acc",)
    bare = OptunaSearch(mode="max")
    bare.set_search_properties(None, None, SPACE)
    assert bare.objectives == (DEFAULT_METRIC,)
    with pytest.raises(UsageError, match="metric='acc' and TuneConfig metric='loss'"):
        searcher.set_search_properties("loss", "max", SPACE)
