"""Trials in this process: nothing at the same time, the same every time, cheap."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tune.executors.driving import Drive, Failed, Go, Reported

from keepstep import tune
from keepstep.tune.executors.inline import InlineExecutor


@pytest.fixture
def inline(tmp_path: Path) -> Iterator[Callable[..., Drive]]:
    made: list[InlineExecutor] = []

    def of(trainable: Any) -> Drive:
        made.append(InlineExecutor(trainable, total={"cpu": 4.0}))
        return Drive(made[-1], tmp_path)

    yield of
    for executor in made:
        executor.close()
        executor.close()


def test_trials_take_turns_in_the_order_of_their_launch(inline: Callable[..., Drive]) -> None:
    busy = []

    def train(config: dict[str, Any]) -> None:
        for step in range(3):
            busy.append(config["x"])
            time.sleep(0.001)
            assert busy[-1] == config["x"]
            tune.report({"step": step})

    d = inline(train)
    jobs = [d.launch("", {"x": x}) for x in "abc"]
    d.last(*(job.run for job in jobs))
    assert "".join(busy) == "abcabcabc"


def draw(config: dict[str, Any]) -> None:
    for _ in range(config["n"]):
        drawn = random.random(), np.random.randn(), torch.rand(()).item()  # noqa: NPY002
        tune.report({"drawn": drawn})


def drawn(d: Drive, order: str, n: int = 3) -> dict[str, list[Any]]:
    jobs = {name: d.launch(name, {"n": n}) for name in order}
    d.last(*(job.run for job in jobs.values()))
    return {name: [e.metrics["drawn"] for e in d.of(job.run, Reported)] for name, job in jobs.items()}


def test_what_a_trial_draws_does_not_depend_on_others(inline: Callable[..., Drive]) -> None:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    d = inline(draw)
    together, again, alone = drawn(d, "abc"), drawn(d, "cb"), drawn(d, "b")
    assert together["b"] == again["b"] == alone["b"]
    assert together["c"] == again["c"]
    assert together["a"] != together["b"]
    d.executor.close()
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert after[0] == before[0]
    assert all(map(np.array_equal, after[1], before[1]))
    assert torch.equal(after[2], before[2])


def test_configurations_are_the_trials_own(inline: Callable[..., Drive]) -> None:
    def train(config: dict[str, Any]) -> None:
        config["inner"]["list"].append(1)
        tune.report({"n": len(config["inner"]["list"])})

    config = {"inner": {"list": []}}
    d = inline(train)
    assert [d.run("", config)[0][0].metrics["n"] for _ in range(2)] == [1, 1]
    assert config == {"inner": {"list": []}}


def test_directory_and_environment_are_the_drivers_between_turns(inline: Callable[..., Drive]) -> None:
    def train(config: dict[str, Any]) -> None:
        os.environ["LEFT_BEHIND_BY"] = "nobody"
        del os.environ["LEFT_BEHIND_BY"]
        tune.report({})
        tune.report({"cwd": str(Path.cwd()), "mine": os.environ["MINE"]})

    d = inline(train)
    here = Path.cwd()
    one, two = (d.launch(name, env={"MINE": name}) for name in ("one", "two"))
    d.event(one.run, Reported)
    assert Path.cwd() == here
    assert "MINE" not in os.environ
    d.last(one.run, two.run)
    for job in (one, two):
        assert d.of(job.run, Reported)[1].metrics == {
            "cwd": str(d.root / job.trial_id / "working_dir"),
            "mine": job.trial_id,
        }


def test_a_closed_executor_unwinds_what_waits(inline: Callable[..., Drive]) -> None:
    ended = []

    def train(config: dict[str, Any]) -> None:
        try:
            tune.report({})
        finally:
            ended.append(config["x"])

    d = inline(train)
    for x in (1, 2):
        d.event(d.launch("", {"x": x}).run, Reported)
    d.executor.close()
    assert ended == [1, 2]


def test_reporting_outside_of_a_trial_says_where_it_works(inline: Callable[..., Drive]) -> None:
    d = inline(draw)
    d.run("", {"n": 1})
    with pytest.raises(ValueError, match=r"tune.report\(\) was called outside of a trial"):
        tune.report({"x": 1})
    with pytest.raises(ValueError, match="outside of a trial"):
        tune.get_checkpoint()
    with pytest.raises(ValueError, match="outside of a trial"):
        tune.get_context().get_trial_id()


def test_ten_times_the_trials_take_ten_times_as_long(inline: Callable[..., Drive]) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"x": 1})

    d = inline(train)
    threads = threading.active_count()

    def cost_ms(count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            job = d.launch("t")
            for _ in range(2):
                for event in d.executor.wait(0):
                    assert not isinstance(event, Failed)
                    if isinstance(event, Reported):
                        d.executor.order(event.run, Go())
            assert d.executor.fits({"cpu": 4.0}), job
        return (time.process_time() - start) / count * 1e3

    cost_ms(50)
    assert min(cost_ms(500), cost_ms(500)) < 3 * cost_ms(50) + 0.5
    assert threading.active_count() <= threads + 1  # one thread serves them all
