"""Population Based Training: who takes over from whom, and with what configuration."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tests.tune.schedulers.simulator import Simulation, World

import keepstep.tune as tune
from keepstep.errors import TrialError, UsageError
from keepstep.tune.experiment.records import ResultReported
from keepstep.tune.schedulers.base import FIFOScheduler
from keepstep.tune.schedulers.explore import explored, filled, from_one_seed
from keepstep.tune.schedulers.pbt import PopulationBasedTraining

TIME = "training_iteration"


def moving(config: Mapping[str, Any], weight: float, iteration: int) -> tuple[float, float]:
    """The best "x" grows with time: 0.1 at the beginning, 0.9 after 40 iterations."""
    best = 0.1 + 0.8 * iteration / 40
    after = weight + math.exp(-(((config["x"] - best) / 0.1) ** 2))
    return after, after


def moving_pbt(synch: bool, seed: int) -> PopulationBasedTraining:
    scheduler = PopulationBasedTraining(
        TIME, perturbation_interval=4, hyperparam_mutations={"x": tune.uniform(0, 1)}, synch=synch
    )
    scheduler.set_seed(seed)
    return scheduler


@pytest.mark.parametrize("synch", [False, True])
@pytest.mark.parametrize("slots", [3, 8])
def test_pbt_beats_random_search_where_the_best_value_changes_over_time(synch: bool, slots: int) -> None:
    for seed in range(2):
        chance = random.Random(seed)
        configs = [{"x": chance.random()} for _ in range(8)]
        world = World(slots=slots, end=40, seed=seed)
        fixed = Simulation(FIFOScheduler, configs, world, learn=moving).run()
        moved = Simulation(lambda: moving_pbt(synch, seed), configs, world, learn=moving).run()  # noqa: B023
        best = [max(trial.metric("score") for trial in done.trials) for done in (fixed, moved)]
        assert best[1] > 1.3 * best[0]


def of_two() -> PopulationBasedTraining:
    return PopulationBasedTraining(TIME, perturbation_interval=3, hyperparam_mutations={"quality": [0, 1]})


def exploits(simulation: Simulation) -> list[ResultReported]:
    return [
        record
        for record in simulation.records
        if isinstance(record, ResultReported) and any(act.do == "exploit" for act in record.acts)
    ]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_trials_take_turns_where_slots_are_fewer(slots: int) -> None:
    def check(now: Simulation) -> None:
        reached = [trial.iteration for trial in now.trials if not trial.is_finished()]
        assert max(reached, default=0) - min(reached, default=0) <= 6

    configs = [{"quality": number / 5} for number in range(5)]
    world = World(slots=slots, end=12, classes=False)
    done = Simulation(of_two, configs, world, check=check if slots == 1 else None).run()
    assert set(done.reached().values()) == {12}
    assert exploits(done)


def test_a_class_that_saves_only_when_asked_is_exploited_too() -> None:
    configs = [{"quality": number / 4} for number in range(4)]
    done = Simulation(of_two, configs, World(slots=4, end=12, classes=True)).run()
    assert exploits(done)


def test_what_has_no_checkpoint_is_not_exploited_and_that_is_said_once() -> None:
    configs = [{"quality": number / 4} for number in range(4)]
    done = Simulation(of_two, configs, World(slots=4, end=12, classes=False, every=0)).run()
    assert not exploits(done)
    assert set(done.reached().values()) == {12}
    assert len([said for said in done.messages if "has a checkpoint" in said]) == 1


def test_a_diverged_trial_is_rescued_and_never_a_source() -> None:
    def learn(config: Mapping[str, Any], weight: float, iteration: int) -> tuple[float, float]:
        weight = math.nan if config["x"] > 1 else weight + config["x"]
        return weight, weight

    def make() -> PopulationBasedTraining:
        return PopulationBasedTraining(
            TIME, perturbation_interval=2, hyperparam_mutations={"x": [0.5]}, quantile_fraction=0.5
        )

    configs = [{"x": 2.0}, {"x": 0.5}, {"x": 2.0}, {"x": 0.4}]
    done = Simulation(make, configs, World(slots=2, end=10), learn=learn).run()
    assert all(math.isfinite(trial.metric("score")) for trial in done.trials)


def test_the_seed_decides() -> None:
    def changes(seed: int) -> list[Any]:
        configs = [{"x": number / 6} for number in range(6)]
        done = Simulation(
            lambda: moving_pbt(False, seed), configs, World(slots=6, end=20), learn=moving
        ).run()
        return [act.config for record in exploits(done) for act in record.acts]

    assert changes(1) == changes(1)
    assert changes(1) != changes(2)


# ------------------------------------------------------------------------------------------------- exploring


def test_configurations_are_filled_where_they_lack_something() -> None:
    mutations = {"lr": tune.uniform(0, 1), "act": ["relu", "tanh"], "deep": {"width": lambda: 3, "p": [0.5]}}
    config, drawn = filled({"lr": 7.0, "deep": {"p": 0.1}, "other": 1}, mutations, random.Random(0))
    assert config["lr"] == 7.0
    assert config["act"] in ("relu", "tanh")
    assert config["deep"] == {"p": 0.1, "width": 3}
    assert drawn == {"act": config["act"], "deep/width": 3}


def test_a_step_takes_neighbours_of_a_list_and_multiples_of_a_number() -> None:
    mutations = {
        "list": [1, 2, 3, 4],
        "float": tune.uniform(0, 10),
        "int": tune.randint(1, 100),
        "deep": {"list": ["a", "b", "c"]},
        "flag": tune.choice([True, False]),
        "name": tune.choice(["relu", "tanh"]),
    }
    plain = {"list": 2, "float": 1.0, "int": 11, "flag": True, "name": "relu", "k": 0}
    config = {**plain, "deep": {"list": "b", "kept": 1}}
    seen: dict[str, set[Any]] = {"list": set(), "float": set(), "int": set(), "deep": set()}
    for seed in range(40):
        new = explored(config, mutations, random.Random(seed), resample_probability=0, factors=(1.2, 0.8))
        assert (new["flag"], new["name"], new["k"], new["deep"]["kept"]) == (True, "relu", 0, 1)
        for name in ("list", "float", "int"):
            seen[name].add(new[name])
        seen["deep"].add(new["deep"]["list"])
    assert seen == {"list": {1, 3}, "float": {0.8, 1.2}, "int": {9, 13}, "deep": {"a", "c"}}
    assert config["deep"] == {"list": "b", "kept": 1}


def test_values_outside_a_list_and_resampled_ones_are_drawn_anew() -> None:
    anew = explored(
        {"a": 9, "b": 1.0, "c": "relu"},
        {"a": [1, 2], "b": lambda: 5.0, "c": tune.choice(["tanh"])},
        random.Random(0),
        resample_probability=1.0,
        factors=(2.0,),
    )
    assert anew["a"] in (1, 2)
    assert (anew["b"], anew["c"]) == (5.0, "tanh")


def test_functions_of_the_user_draw_alike_and_leave_the_generators_alone() -> None:
    python, legacy = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    drawn = []
    for _ in range(2):
        with from_one_seed("x"):
            drawn.append((random.random(), float(np.random.uniform())))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert (random.getstate(), repr(np.random.get_state())) == (python, legacy)  # noqa: NPY002


def test_the_users_own_exploration_has_the_last_word() -> None:
    def make() -> PopulationBasedTraining:
        own = PopulationBasedTraining(TIME, perturbation_interval=2, custom_explore_fn=explore)
        own.set_seed(3)
        return own

    def explore(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "own": random.random()}

    configs = [{"quality": number / 4} for number in range(4)]
    done = Simulation(make, configs, World(slots=2, end=8, kills=0.1)).run()
    assert all("own" in act.config for record in exploits(done) for act in record.acts if act.config)
    bad = PopulationBasedTraining(TIME, perturbation_interval=2, custom_explore_fn=lambda config: None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="custom_explore_fn returned None"):
        Simulation(lambda: bad, configs, World(slots=2, end=8)).run()


# --------------------------------------------------------------------------------------------------- refusals


def test_results_without_the_metric_are_refused_or_left_out() -> None:
    mutations = {"quality": [0, 1]}
    strict = PopulationBasedTraining(TIME, hyperparam_mutations=mutations)
    simulation = Simulation(lambda: strict, [{"quality": 1}])
    strict.metric = "acc"
    with pytest.raises(TrialError, match="without the metric 'acc'"):
        simulation.run()
    lenient = PopulationBasedTraining(TIME, hyperparam_mutations=mutations, require_attrs=False)
    simulation = Simulation(lambda: lenient, [{"quality": 1}])
    lenient.metric = "acc"
    assert "'acc'" in simulation.run().messages[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hyperparam_mutations": {}}, "nothing to change"),
        ({"hyperparam_mutations": {"lr": 3}}, r"hyperparam_mutations\['lr'\] is 3; expected a list"),
        ({"hyperparam_mutations": {"a": {"b": []}}}, r"\['a'\]\['b'\] is empty"),
        ({"hyperparam_mutations": {"a": tune.sample_from(lambda spec: 1)}}, "sample_from"),
        ({"hyperparam_mutations": {"a": [1]}, "quantile_fraction": 0.6}, r"quantile_fraction=0.6.*<= 0.5"),
        ({"hyperparam_mutations": {"a": [1]}, "perturbation_interval": 0}, "perturbation_interval=0"),
        ({"hyperparam_mutations": {"a": [1]}, "resample_probability": 2}, "resample_probability=2"),
        ({"hyperparam_mutations": {"a": [1]}, "perturbation_factors": ()}, "perturbation_factors"),
        ({"hyperparam_mutations": {"a": [1]}, "synch": "yes"}, "synch='yes'"),
        ({"custom_explore_fn": 3}, "custom_explore_fn=3"),
    ],
)
def test_bad_values_are_refused_in_words(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PopulationBasedTraining(TIME, **arguments)
