"""PB2: within bounds, and better than what was drawn at random."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from tests.tune.schedulers.simulator import Simulation, World

from keepstep.errors import UsageError
from keepstep.tune.experiment.records import ResultReported
from keepstep.tune.schedulers.base import FIFOScheduler
from keepstep.tune.schedulers.gaussian_process import Observations, next_point
from keepstep.tune.schedulers.pb2 import PB2

TIME = "training_iteration"
BOUNDS = {"x": [0.0, 2.0], "deep": {"y": [-1.0, 1.0], "width": [1, 9]}}


def smooth(config: Mapping[str, Any], weight: float, iteration: int) -> tuple[float, float]:
    """Each step gains the more, the nearer x is to 1.6 and y to -0.5."""
    gain = math.exp(-(((config["x"] - 1.6) / 0.4) ** 2) - ((config["deep"]["y"] + 0.5) / 0.4) ** 2)
    return weight + gain, weight + gain


def make(seed: int, **settings: Any) -> PB2:
    scheduler = PB2(TIME, perturbation_interval=2, hyperparam_bounds=BOUNDS, **settings)
    scheduler.set_seed(seed)
    return scheduler


@pytest.mark.parametrize("synch", [False, True])
def test_it_stays_within_bounds_and_beats_random_search(synch: bool) -> None:
    gained = []
    for seed in range(2):
        chance = random.Random(seed)
        configs = [
            {"x": chance.random(), "deep": {"y": 2 * chance.random() - 1, "width": 3, "kept": 0}}
            for _ in range(4)
        ]
        world = World(slots=4, end=40, seed=seed)
        drawn = Simulation(FIFOScheduler, configs, world, learn=smooth).run()
        chosen = Simulation(lambda: make(seed, synch=synch), configs, world, learn=smooth).run()  # noqa: B023
        gained.append([max(t.metric("score") for t in done.trials) for done in (drawn, chosen)])
        acts = [act for r in chosen.records if isinstance(r, ResultReported) for act in r.acts]
        assert acts
        for config in [act.config for act in acts if act.config]:
            assert 0 <= config["x"] <= 2
            assert -1 <= config["deep"]["y"] <= 1
            assert config["deep"]["width"] in range(1, 10)
            assert config["deep"]["kept"] == 0
    assert sum(chosen for _, chosen in gained) > 2 * sum(drawn for drawn, _ in gained)


def test_what_configurations_lack_is_drawn_and_a_restart_decides_alike() -> None:
    configs: list[dict[str, Any]] = [{} for _ in range(4)]
    done = Simulation(lambda: make(7), configs, World(slots=2, end=12, kills=0.1), learn=smooth).run()
    assert all(0 <= trial.config["x"] <= 2 for trial in done.trials)
    assert done.trials[0].evaluated_params.keys() >= {"x", "deep/y"}
    done.kill()


def test_the_next_point_is_where_most_is_to_be_expected() -> None:
    generator = np.random.default_rng(0)
    points = np.concatenate([np.zeros((40, 1)), generator.random((40, 1))], axis=1)
    seen = Observations(np.arange(40) / 4, points, -((points[:, 1] - 0.7) ** 2))
    nobody = Observations(np.zeros(0), np.zeros((0, 2)), np.zeros(0))
    found = next_point(seen, nobody, 10.0, np.zeros(1), 1, generator)
    assert abs(found[0] - 0.7) < 0.15


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        (None, "hyperparam_bounds=None; expected a dict"),
        ({"x": [1, 0]}, r"x=\[1, 0\]; expected \[least, greatest\]"),
        ({"a": {"b": [1]}}, r"a/b=\[1\]"),
        ({"x": ["low", "high"]}, "two numbers"),
    ],
)
def test_bad_bounds_are_refused_in_words(bounds: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        PB2(TIME, hyperparam_bounds=bounds)
