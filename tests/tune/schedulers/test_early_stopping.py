"""ASHA, HyperBand and the median rule: they find the best curve with a part of the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from tests.tune.schedulers.simulator import Simulation, World

from keepstep.errors import TrialError, UsageError
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.schedulers.async_hyperband import ASHAScheduler, AsyncHyperBandScheduler
from keepstep.tune.schedulers.base import Controller, Decision, FIFOScheduler, TrialScheduler
from keepstep.tune.schedulers.hyperband import HyperBandScheduler
from keepstep.tune.schedulers.median_stopping_rule import MedianStoppingRule

TIME = "training_iteration"
QUALITIES = [{"quality": (11 * number % 32) / 32} for number in range(32)]
BEST = next(number for number, config in enumerate(QUALITIES) if config["quality"] == 31 / 32)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: AsyncHyperBandScheduler(TIME, max_t=27, reduction_factor=3), 0.5),
        (lambda: AsyncHyperBandScheduler(TIME, max_t=27, grace_period=3, reduction_factor=3), 0.55),
        (lambda: HyperBandScheduler(TIME, max_t=27, reduction_factor=3), 0.6),
        (lambda: MedianStoppingRule(TIME, grace_period=3), 0.75),
    ],
    ids=["asha", "asha with grace", "hyperband", "median"],
)
def test_the_best_of_32_is_found_with_a_part_of_the_work(
    make: Callable[[], TrialScheduler], most: float
) -> None:
    everything = Simulation(FIFOScheduler, QUALITIES, World(slots=4, end=27)).run()
    assert everything.spent == 32 * 27
    found = Simulation(make, QUALITIES, World(slots=4, end=27)).run()
    assert found.reached()[BEST] == 27
    assert found.spent < most * everything.spent


def test_asha_stops_at_rungs_what_is_not_among_the_best() -> None:
    worse_and_worse = [{"quality": 1 - number / 9} for number in range(9)]
    found = Simulation(
        lambda: ASHAScheduler(TIME, max_t=9, reduction_factor=3), worse_and_worse, World(slots=1, end=20)
    ).run()
    assert found.reached() == {0: 9, **dict.fromkeys(range(1, 9), 1)}


def test_asha_lets_the_last_run_on_if_told_so() -> None:
    found = Simulation(
        lambda: ASHAScheduler(TIME, max_t=4, stop_last_trials=False), QUALITIES[:1], World(end=11)
    ).run()
    assert found.reached() == {0: 11}


def test_the_brackets_of_asha_depend_on_the_seed_alone() -> None:
    def rungs(seed: int) -> list[int]:
        def make() -> TrialScheduler:
            scheduler = ASHAScheduler(TIME, max_t=16, reduction_factor=2, brackets=4)
            scheduler.set_seed(seed)
            return scheduler

        return list(Simulation(make, QUALITIES, World(slots=1, end=16)).run().reached().values())

    assert rungs(1) == rungs(1)
    assert rungs(1) != rungs(2)


def test_hyperband_halves_a_bracket_when_all_have_come() -> None:
    # With max_t=9 and factor 3: 3 trials to the end, then 5 (from 9/3), then 9 (from 9/9).
    configs = [{"quality": number / 17} for number in range(17)]
    found = Simulation(
        lambda: HyperBandScheduler(TIME, max_t=9, reduction_factor=3), configs, World(slots=3, end=30)
    ).run()
    reached = found.reached()
    assert [reached[number] for number in range(3)] == [9, 9, 9]
    assert [reached[number] for number in range(3, 8)] == [3, 3, 3, 9, 9]
    assert [reached[number] for number in range(8, 17)] == [1, 1, 1, 1, 1, 1, 3, 3, 9]


def test_hyperband_goes_on_without_those_that_failed() -> None:
    found = Simulation(
        lambda: HyperBandScheduler(TIME, max_t=9), QUALITIES, World(slots=3, fails=0.2, final=1.0, end=30)
    ).run()
    assert all(trial.is_finished() for trial in found.trials)
    assert 9 in found.reached().values()


class StopsThePaused(FIFOScheduler):
    """Pauses the first trial, and ends it when the second one reports."""

    def __init__(self) -> None:
        self.removed: list[tuple[int, str]] = []

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        if trial.number == 0:
            return "PAUSE"
        for other in tune_controller.get_live_trials():
            if other.number == 0:
                tune_controller.stop_trial(other)
        return "CONTINUE"

    def on_trial_remove(self, tune_controller: Controller, trial: Trial) -> None:
        self.removed.append((trial.number, trial.status))


def test_a_scheduler_is_told_of_a_trial_that_is_ended_while_it_waits() -> None:
    made: list[StopsThePaused] = []

    def make() -> TrialScheduler:
        made.append(StopsThePaused())
        return made[-1]

    found = Simulation(make, QUALITIES[:2], World(slots=1, end=3)).run()
    assert found.reached() == {0: 1, 1: 3}
    assert made[-1].removed == [(0, "TERMINATED")]


def test_the_median_rule_may_set_trials_back_instead() -> None:
    def make() -> TrialScheduler:
        return MedianStoppingRule(TIME, grace_period=3, hard_stop=False)

    found = Simulation(make, QUALITIES, World(slots=1, end=9)).run()
    assert set(found.reached().values()) == {9}
    ends = [record.trial for record in found.records if record.kind == "ended"]
    last = [found.history.trial(trial).config["quality"] for trial in ends[-8:]]
    first = [found.history.trial(trial).config["quality"] for trial in ends[:8]]
    assert sum(first) > sum(last)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AsyncHyperBandScheduler(TIME, max_t=9, reduction_factor=3),
        lambda: HyperBandScheduler(TIME, max_t=9),
        lambda: MedianStoppingRule(TIME, grace_period=2, min_samples_required=2),
    ],
    ids=["asha", "hyperband", "median"],
)
def test_nan_is_the_worst(make: Callable[[], TrialScheduler]) -> None:
    def learn(config: Mapping[str, Any], weight: float, iteration: int) -> tuple[float, float]:
        return 0.0, config["quality"]

    configs = [{"quality": math.nan if number % 2 else 0.5 + number / 100} for number in range(17)]
    found = Simulation(make, configs, World(slots=3, end=9), learn=learn).run()
    reached = found.reached()
    ends = [number for number in reached if reached[number] == 9 and number > 8]
    assert ends
    assert all(number % 2 == 0 for number in ends)


def test_a_result_without_the_metric_is_named() -> None:
    scheduler = AsyncHyperBandScheduler(TIME, max_t=9)
    simulation = Simulation(lambda: scheduler, QUALITIES)
    scheduler.metric = "val/acc"
    with pytest.raises(
        TrialError, match=r"formula_t\d reported a result without the metric 'val/acc'.*'score'"
    ):
        simulation.run()


def test_a_metric_that_is_no_number_is_named() -> None:
    scheduler = AsyncHyperBandScheduler(TIME, "score", "max")
    simulation = Simulation(lambda: scheduler, QUALITIES, learn=lambda *_: (0.0, "good"))  # type: ignore[arg-type,return-value]
    with pytest.raises(TrialError, match=r"score='good'.*expected a number"):
        simulation.run()


def test_an_unknown_measure_of_time_is_said_once() -> None:
    found = Simulation(lambda: AsyncHyperBandScheduler("epoch"), QUALITIES[:3], World(end=3)).run()
    assert len(found.messages) == 1
    assert "'epoch'" in found.messages[0]


def test_a_function_that_reports_no_checkpoint_is_told_what_a_pause_costs() -> None:
    world = World(slots=1, end=9, classes=False, every=0)
    found = Simulation(lambda: HyperBandScheduler(TIME, max_t=9), QUALITIES[:10], world).run()
    assert len([said for said in found.messages if "starts from its beginning" in said]) == 1
    world = World(slots=1, end=9, classes=False, every=1)
    found = Simulation(lambda: HyperBandScheduler(TIME, max_t=9), QUALITIES[:10], world).run()
    assert not found.messages


def test_metric_and_mode_are_needed() -> None:
    with pytest.raises(UsageError, match=r"mode=None, and needs both"):
        HyperBandScheduler(metric="loss").set_search_properties(None, None, {})
    alone = HyperBandScheduler(mode="min")
    alone.set_search_properties(None, None, {})
    assert alone.metric == "_metric"


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        (AsyncHyperBandScheduler, {"max_t": 0}, r"max_t=0; expected a number > 0"),
        (AsyncHyperBandScheduler, {"grace_period": 9, "max_t": 3}, r"grace_period=9 and max_t=3"),
        (AsyncHyperBandScheduler, {"reduction_factor": 1}, r"reduction_factor=1; expected a number > 1"),
        (AsyncHyperBandScheduler, {"brackets": 1.5}, r"brackets=1.5; expected a whole number >= 1"),
        (AsyncHyperBandScheduler, {"mode": "best"}, r"mode='best'; expected \"min\" or \"max\""),
        (HyperBandScheduler, {"max_t": math.nan}, r"max_t=nan"),
        (HyperBandScheduler, {"stop_last_trials": 1}, r"stop_last_trials=1; expected True or False"),
        (HyperBandScheduler, {"time_attr": ""}, r"time_attr=''"),
        (MedianStoppingRule, {"min_samples_required": 0}, r"min_samples_required=0"),
        (MedianStoppingRule, {"grace_period": -1}, r"grace_period=-1; expected a number >= 0"),
    ],
)
def test_bad_values_are_refused_in_words(kind: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        kind(**arguments)
