"""Stoppers: `ray.tune`'s, as functions of what they are told."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

from keepstep.errors import TuneError, UsageError
from keepstep.tune.search.description import described, revived
from keepstep.tune.stopper import (
    CombinedStopper,
    ExperimentPlateauStopper,
    FunctionStopper,
    MaximumIterationStopper,
    NoopStopper,
    Stopper,
    TimeoutStopper,
    TrialPlateauStopper,
    make_stopper,
)


def ends(stopper: Stopper, values: Iterable[Any], trial: str = "t", metric: str = "loss") -> int | None:
    """The first of these results that ends the trial, counted from 1."""
    for at, value in enumerate(values, start=1):
        if stopper(trial, {metric: value}):
            return at
    return None


def test_a_dict_ends_a_trial_when_a_bound_is_reached() -> None:
    stopper = make_stopper({"acc": 0.9, "val/acc": 0.5, "training_iteration": 3})
    assert not stopper("a", {"acc": 0.8, "training_iteration": 1})
    assert stopper("a", {"acc": 0.9})
    assert stopper("a", {"val": {"acc": np.float32(0.5)}})
    assert stopper("a", {"val/acc": 2})
    assert stopper("a", {"training_iteration": 3, "acc": math.nan})
    assert not stopper("a", {"acc": "high"})
    assert not stopper.stop_all()
    assert make_stopper({"over": True})("a", {"over": True})


def test_a_plateau_may_be_as_flat_as_can_be() -> None:
    assert ends(TrialPlateauStopper("loss", std=0.0), [1.0, 1.0, 1.0, 1.0 + 1e-12, *[0.5] * 9]) == 8
    assert ends(ExperimentPlateauStopper("loss", std=0, top=3), [3.0, 2.0, 2.0, 2.0, 1.0]) == 4


def test_metrics_that_never_come_are_told_once() -> None:
    stopper = make_stopper([{"acc": 1, "loss": 9}, TrialPlateauStopper("val/f1")])
    for _ in range(50):
        stopper("a", {"loss": 1.0, "val": {"acc": 0.5}, "training_iteration": 1})
    assert stopper.messages == [
        f"{who}, and none of the first 20 results has it; they have: loss, val/acc"
        for who in ("stop names 'acc'", "TrialPlateauStopper looks at 'val/f1'")
    ]
    known = make_stopper({"acc": 1})
    known("a", {"acc": 0.1})
    for _ in range(50):
        known("a", {"loss": 1})
    assert known.messages == []


def test_a_function_is_called_with_trial_and_result() -> None:
    stopper = make_stopper(
        lambda trial_id, result: trial_id == "a" and result["val/acc"] > result["val"]["x"]
    )
    assert stopper("a", {"val": {"acc": 2, "x": 1}})
    assert not stopper("b", {"val": {"acc": 2, "x": 1}})
    with pytest.raises(
        TuneError, match=r"lambda.*raised KeyError: 'val/acc' on a result of trial a.*has: loss"
    ):
        stopper("a", {"loss": 1, "timestamp": 3})


def test_iterations_are_counted_for_each_trial() -> None:
    stopper = MaximumIterationStopper(3)
    assert ends(stopper, [0] * 9, "a") == 3
    assert ends(stopper, [0] * 9, "b") == 3


def test_a_trial_on_a_plateau_ends() -> None:
    assert ends(TrialPlateauStopper("loss"), [9, 5, 1, 1, 1, 1, 1]) == 6
    assert ends(TrialPlateauStopper("loss", grace_period=7), [9, 5, 1, 1, 1, 1, 1, 1]) == 7
    assert ends(TrialPlateauStopper("loss", num_results=2), [9, 5, 1, 1, 1]) == 4
    far = TrialPlateauStopper("loss", num_results=2, grace_period=0, metric_threshold=0, mode="min")
    assert ends(far, [1, 1, 1, 0, 0]) == 5
    assert ends(TrialPlateauStopper("loss"), [1, None, 1, math.nan, 1, 1]) == 6
    assert ends(TrialPlateauStopper("loss"), [math.inf] * 9) is None
    both = TrialPlateauStopper("loss")
    assert ends(both, [1, 1, 1], "a") is None
    assert ends(both, [1, 1, 1], "b") is None


def test_an_experiment_on_a_plateau_ends() -> None:
    stopper = ExperimentPlateauStopper("loss", top=3, patience=2)
    told = [
        (at, stopper("ab"[at % 2], {"loss": loss}), stopper.stop_all())
        for at, loss in enumerate([9, 5, 1, 1, 1, 7, math.nan, 1])
    ]
    assert [at for at, ended, all_end in told if ended and all_end] == [5, 6, 7]
    best = ExperimentPlateauStopper("acc", top=2, mode="max")
    assert ends(best, [1, 5, 3, 5], metric="acc") == 4


def test_time_passes_from_result_to_result_but_not_while_nothing_runs() -> None:
    stopper = TimeoutStopper(timedelta(seconds=100))

    def told(at: float, ran: float) -> bool:
        assert not stopper("t", {"timestamp": at, "time_since_restore": ran})
        return stopper.stop_all()

    assert not told(1_000, 10)  # 10 s until the first result
    assert not told(1_050, 60)
    assert not told(1_049, 5)  # another trial, told late
    assert not told(90_000, 20)  # the driver was away for a day; 20 s of them the trial ran
    assert told(90_020, 40)
    assert not TimeoutStopper(1.5).stop_all()
    plain = TimeoutStopper(3)
    for at in (5, 6, 9):
        plain("t", {"timestamp": at})
    assert plain.stop_all()


class Mine(Stopper):
    def __init__(self) -> None:
        self.told = 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.told += 1
        return False


def test_all_of_several_are_told_and_one_is_enough() -> None:
    mine = Mine()
    stopper = make_stopper([{"loss": 5}, mine, TimeoutStopper(10)])
    assert stopper("a", {"loss": 6, "timestamp": 0, "time_since_restore": 20})
    assert stopper.stop_all()
    assert mine.told == 1
    assert not CombinedStopper(NoopStopper())("a", {})


EVERY: dict[str, Callable[[], Stopper]] = {
    "dict": lambda: make_stopper({"loss": -1, "a/b": 3}),
    "iterations": lambda: MaximumIterationStopper(4),
    "noop": NoopStopper,
    "timeout": lambda: TimeoutStopper(3),
    "trial": lambda: TrialPlateauStopper("loss", metric_threshold=2, mode="min"),
    "experiment": lambda: ExperimentPlateauStopper("loss", top=3, patience=1),
    "several": lambda: CombinedStopper(MaximumIterationStopper(9), CombinedStopper(TimeoutStopper(5.0))),
}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_told_the_same_again_it_says_the_same_from_json_and_after_another_experiment(
    make: Callable[[], Stopper],
) -> None:
    def life(stopper: Stopper) -> list[tuple[bool, bool]]:
        said = []
        for at in range(12):
            result = {"loss": max(1.0, 4.0 - at), "timestamp": at, "time_since_restore": at}
            said.append((stopper("ab"[at % 2], result), stopper.stop_all()))
        return said

    stopper = make()
    first = life(stopper)
    assert life(make()) == first
    assert life(stopper.anew()) == first
    assert life(make_stopper(stopper)) == first
    assert life(revived(json.loads(json.dumps(described(stopper))))) == first


class Late(TimeoutStopper):
    """A class of one's own, derived from one of keepstep's, with other arguments."""

    def __init__(self) -> None:
        super().__init__(3)


def test_a_class_of_ones_own_is_used_as_it_is() -> None:
    late = Late()
    assert make_stopper(late) is late
    assert make_stopper([late])("t", {}) is False
    with pytest.raises(UsageError, match="Late"):
        revived(described(late), argument="stop")


def test_a_function_has_to_be_handed_over_again() -> None:
    def too_long(trial_id: str, result: dict[str, Any]) -> bool:
        return False

    for stop in (too_long, FunctionStopper(too_long), [MaximumIterationStopper(3), too_long]):
        with pytest.raises(UsageError, match="too_long"):
            revived(described(stop), argument="stop")
    mine = Mine()
    assert mine.anew() is mine
    with pytest.raises(UsageError, match="Mine"):
        revived(described([mine]), argument="stop")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: make_stopper(3), "expected {metric: bound}"),
        (lambda: make_stopper({"a": {"b": 3}}), "with slashes: {'a/b': ...}"),
        (lambda: make_stopper({"a": "b"}), "a number"),
        (lambda: make_stopper({"a": math.nan}), "a number"),
        (lambda: make_stopper(lambda result: True), r"cannot be called with \(trial_id, result\)"),
        (lambda: make_stopper(NoopStopper), r"NoopStopper\(...\)"),
        (lambda: FunctionStopper(NoopStopper()), "takes a function"),  # type: ignore[arg-type]
        (lambda: CombinedStopper({"a": 1}), "takes stoppers"),  # type: ignore[arg-type]
        (lambda: MaximumIterationStopper(0), "max_iter is 0"),
        (lambda: TimeoutStopper("1h"), "timedelta"),  # type: ignore[arg-type]
        (lambda: TrialPlateauStopper("a", metric_threshold=0), "metric_threshold=0"),
        (lambda: TrialPlateauStopper("a", std=-1), "std is -1"),
        (lambda: TrialPlateauStopper(""), "name of a metric"),
        (lambda: ExperimentPlateauStopper("a", top=1), "top is 1"),
        (lambda: ExperimentPlateauStopper("a", mode="up"), 'expected "min" or "max"'),  # type: ignore[arg-type]
    ],
)
def test_arguments_that_cannot_work_are_refused(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()
