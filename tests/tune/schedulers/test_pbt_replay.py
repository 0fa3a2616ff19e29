"""A schedule of configurations that was found is gone through again, by one trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.tune.schedulers.simulator import Simulation, World

import keepstep.tune as tune
from keepstep.errors import UsageError
from keepstep.tune.experiment.journal import JOURNAL_NAME, Journal, LocalLog
from keepstep.tune.schedulers.pbt import PopulationBasedTraining
from keepstep.tune.schedulers.pbt_replay import PopulationBasedTrainingReplay
from keepstep.tune.schedulers.policy import Change, Policy, read_policy

TIME = "training_iteration"


def gained(config: Mapping[str, Any], weight: float, iteration: int) -> tuple[float, float]:
    """What is gained depends on the configuration and on when it counts: no other schedule comes to that."""
    after = weight * 1.01 + config["x"] * iteration
    return after, after


def population(directory: Path, **world: Any) -> Simulation:
    def make() -> PopulationBasedTraining:
        mutations = {"x": tune.uniform(0, 1)}
        return PopulationBasedTraining(TIME, perturbation_interval=3, hyperparam_mutations=mutations)

    configs = [{"x": number / 6, "kept": [1, 2]} for number in range(6)]
    done = Simulation(make, configs, World(end=16, **world), learn=gained).run()
    journal = Journal(LocalLog(directory / JOURNAL_NAME))
    for record in [done.made, *done.records]:
        journal.add(record)
    journal.commit()
    journal.close()
    return done


@pytest.mark.parametrize("classes", [True, False])
def test_the_replay_of_every_trial_comes_to_its_score(tmp_path: Path, classes: bool) -> None:
    done = population(tmp_path, slots=3, classes=classes, kills=0.05)
    changed = 0
    for trial in done.trials:
        scheduler = PopulationBasedTrainingReplay(tmp_path / trial.dirname)
        world = World(slots=1, end=16, classes=classes)
        again = Simulation(lambda: scheduler, [{}], world, learn=gained).run()  # noqa: B023
        changed += len(read_policy(tmp_path / trial.dirname).changes)
        assert again.trials[0].metric("score") == trial.metric("score")
        assert again.trials[0].config == trial.config
    assert changed >= 5


def test_a_trial_is_found_by_the_name_of_rays_file(tmp_path: Path) -> None:
    population(tmp_path, slots=3)
    assert read_policy(tmp_path / "pbt_policy_t2.txt") == read_policy(tmp_path / "t2")


def test_rays_own_file_is_read(tmp_path: Path) -> None:
    rows = [
        ["9_b", "7_a", 2, 2, {"x": 9}, {"x": 8}],  # overwritten: 9_b took over from another one later
        ["3_c", "1_d", 4, 4, {"x": 1}, {"x": 2}],
        ["9_b", "3_c", 8, 9, {"x": 2}, {"x": 3}],
    ]
    path = tmp_path / "pbt_policy_abc.txt"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_policy(path) == Policy({"x": 1}, (Change(4, {"x": 2}), Change(9, {"x": 3})))
    again = Simulation(
        lambda: PopulationBasedTrainingReplay(path), [{"x": 0}], World(end=12), learn=gained
    ).run()
    weight = 0.0
    for iteration in range(1, 13):
        weight, _ = gained({"x": 1 if iteration <= 4 else 2 if iteration <= 9 else 3}, weight, iteration)
    assert again.trials[0].metric("score") == weight


def test_a_second_trial_is_refused(tmp_path: Path) -> None:
    population(tmp_path, slots=3)
    with pytest.raises(UsageError, match="num_samples=1"):
        Simulation(lambda: PopulationBasedTrainingReplay(tmp_path / "t0"), [{}, {}]).run()


def test_a_function_without_checkpoints_is_told(tmp_path: Path) -> None:
    done = population(tmp_path, slots=3)
    trial = next(t for t in done.trials if read_policy(tmp_path / t.dirname).changes)
    world = World(end=16, classes=False, every=0)
    scheduler = PopulationBasedTrainingReplay(tmp_path / trial.dirname)
    again = Simulation(lambda: scheduler, [{}], world, learn=gained).run()
    assert len([said for said in again.messages if "reports a checkpoint" in said]) == 1


def test_what_is_no_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no policy of Population Based Training"):
        PopulationBasedTrainingReplay(tmp_path / "nothing")
    population(tmp_path, slots=3)
    with pytest.raises(UsageError, match=r"no trial 't77'; it has: t0, t1"):
        PopulationBasedTrainingReplay(tmp_path / "t77")
    broken = tmp_path / "pbt_policy_x.txt"
    broken.write_text('["a", "b"]\n')
    with pytest.raises(UsageError, match="line 1 of"):
        PopulationBasedTrainingReplay(broken)
