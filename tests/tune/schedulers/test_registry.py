"""Schedulers by name, and made anew from what is kept with an experiment."""

from __future__ import annotations

import json
from typing import Any

import pytest

import keepstep.tune as tune
from keepstep.errors import UsageError
from keepstep.tune import schedulers
from keepstep.tune.schedulers.async_hyperband import AsyncHyperBandScheduler
from keepstep.tune.schedulers.registry import create_scheduler
from keepstep.tune.search.description import described, revived

PBT = {"hyperparam_mutations": {"lr": tune.loguniform(1e-4, 1e-1), "deep": {"width": [1, 2]}}}


def test_every_public_name_is_there() -> None:
    for name in schedulers.__all__:
        assert getattr(schedulers, name).__doc__
    assert tune.create_scheduler is create_scheduler
    with pytest.raises(AttributeError, match="ASHAScheduler"):
        schedulers.ASHA  # noqa: B018


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fifo", {}),
        ("asha", {"metric": "loss", "mode": "min", "max_t": 7}),
        ("hyperband", {"max_t": 9}),
        ("median_stopping_rule", {"hard_stop": False}),
        ("pb2", {"hyperparam_bounds": {"lr": [0, 1.5]}, "synch": True}),
        ("pbt", {**PBT, "perturbation_factors": (1.5, 0.5)}),
    ],
)
def test_a_scheduler_is_made_anew_from_json(name: str, arguments: dict[str, Any]) -> None:
    made = create_scheduler(name, **arguments)
    said = json.loads(json.dumps(described(made.describe())))
    again = type(made)(**revived(said))
    assert described(again.describe()) == said
    assert all(getattr(again, key) == value for key, value in arguments.items())


def test_a_new_one_of_the_same_arguments_was_told_nothing() -> None:
    class Own(AsyncHyperBandScheduler):
        def __init__(self, factor: float) -> None:
            super().__init__(reduction_factor=factor)

    own = Own(3)
    assert own.describe() is None
    assert own.anew() is own
    told = create_scheduler("hyperband", max_t=9)
    told.set_search_properties("loss", "min", {})
    again = told.anew()
    assert again is not told
    assert again.describe() == told.describe()


def test_unknown_names_and_arguments_say_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"no scheduler 'bohb'; allowed: .*hyperband"):
        create_scheduler("bohb")
    with pytest.raises(
        UsageError, match=r"AsyncHyperBandScheduler has no argument 'max_time'; allowed: .*max_t"
    ):
        create_scheduler("ASHA", max_time=3)
