"""Schedulers by name, and made anew from what is kept with an experiment."""

from __future__ import annotations

import json
from typing import Any

import pytest

import keepstep.tune as tune
from keepstep.errors import UsageError
from keepstep.tune import schedulers
from keepstep.tune.schedulers.async_hyperband import AsyncHyperBandScheduler
from keepstep.tune.schedulers.registry import create_scheduler, describe_scheduler, make_scheduler

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
    said = json.loads(json.dumps(describe_scheduler(made)))
    again = make_scheduler(said)
    assert type(again) is type(made)
    assert describe_scheduler(again) == said
    assert all(getattr(again, key) == value for key, value in arguments.items())


def test_what_json_does_not_hold_has_to_be_handed_over_again() -> None:
    class Own(AsyncHyperBandScheduler):
        pass

    assert describe_scheduler(Own()) is None
    assert describe_scheduler(create_scheduler("pbt", custom_explore_fn=dict)) is None
    assert describe_scheduler(create_scheduler("pbt", hyperparam_mutations={"lr": lambda: 1.0})) is None


def test_unknown_names_and_arguments_say_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"no scheduler 'bohb'; allowed: .*hyperband"):
        create_scheduler("bohb")
    with pytest.raises(
        UsageError, match=r"AsyncHyperBandScheduler has no argument 'max_time'; allowed: .*max_t"
    ):
        create_scheduler("ASHA", max_time=3)
