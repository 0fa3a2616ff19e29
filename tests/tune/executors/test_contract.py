"""What every executor does alike: events, orders, checkpoints, failures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.tune.executors.conftest import TOTAL, Kind
from tests.tune.executors.driving import Drive, Ended, Failed, Go, Next, Reported, Saved, Started, Stop

from keepstep.errors import UsageError

Drives = Callable[..., Drive]


def test_a_function_reports_and_waits_for_an_order_each_time(drive: Drives) -> None:
    d = drive()
    job = d.launch("t", {"do": "report", "x": 0.5})
    d.event(job.run, Reported)
    for _ in range(3):
        d.executor.wait(0.01)
    assert [type(e) for e in d.of(job.run)] == [Started, Reported]  # it waits, for ever
    d.order(job.run, Go())
    d.until(lambda: len(d.of(job.run, Reported)) == 2)
    d.order(job.run, Go())
    d.until(lambda: len(d.of(job.run, Reported)) == 3)
    (end,) = (d.order(job.run, Go()), d.last(job.run))[1]
    assert [(e.iteration, e.metrics) for e in d.of(job.run, Reported)] == [
        (n, {"step": n - 1, "x": 0.5}) for n in (1, 2, 3)
    ]
    assert end == Ended(run=job.run)
    assert all(0 <= e.time_this_iter_s < 60 for e in d.of(job.run, Reported))


@pytest.mark.parametrize(
    ("value", "metrics"),
    [(None, []), ({}, []), ({"a": 1}, [{"a": 1}]), (0, [{"_metric": 0}]), (2.5, [{"_metric": 2.5}])],
)
def test_what_a_function_returns_is_its_last_result(
    drive: Drives, value: object, metrics: list[object]
) -> None:
    results, end = drive().run("t", {"do": "return", "value": value})
    assert [e.metrics for e in results] == metrics
    assert isinstance(end, Ended)


def test_a_function_that_returns_nonsense_fails_with_what_it_may_return(drive: Drives) -> None:
    results, end = drive().run("t", {"do": "return", "value": "nonsense"})
    assert not results
    assert "'nonsense' (str)" in end.error
    assert "single number" in end.error


def test_a_generator_reports_what_it_yields(drive: Drives) -> None:
    results, end = drive().run("t", {"do": "yield"})
    assert [e.metrics["step"] for e in results] == [0, 1, 2]
    assert isinstance(end, Ended)


def test_metrics_become_plain_values_and_what_json_cannot_hold_is_named(drive: Drives) -> None:
    (result,), _ = drive().run("t", {"do": "values"})
    metrics = dict(result.metrics)
    assert math.isnan(metrics.pop("nan"))
    assert metrics == {
        "inf": math.inf,
        "int": 3,
        "flag": True,
        "one": 2.5,
        "nested": {"a": [1, 2.0]},
        "text": "NaN",
    }
    assert type(metrics["flag"]) is bool
    assert result.left_out == {"nested/what": "builtins.object", "array": "numpy.ndarray"}


def test_a_trial_knows_itself_and_runs_in_its_working_directory(drive: Drives) -> None:
    d = drive()
    (result,), _ = d.run("t", {"do": "context"}, resources={"cpu": 2.0, "gpu": 0.5}, env={"MINE": "1"})
    assert result.metrics == {
        "id": "t",
        "name": "name_of_t",
        "experiment": "experiment",
        "dir": str(d.root / "t" / "working_dir"),
        "cwd": str(d.root / "t" / "working_dir"),
        "resources": {"CPU": 2.0, "GPU": 0.5},
        "world": [1, 0],
        "env": "1",
        "checkpoint": False,
    }
    assert "MINE" not in os.environ
    assert Path.cwd() != d.root / "t" / "working_dir"


def test_a_stopped_function_is_unwound_though_it_catches_exceptions(drive: Drives) -> None:
    d = drive()
    job = d.launch("t", {"do": "stubborn"})
    d.event(job.run, Reported)
    d.order(job.run, Stop())
    (end,) = d.last(job.run)
    assert end == Ended(run=job.run)
    assert (d.root / "t" / "working_dir" / "finally").exists()
    assert not (d.root / "t" / "working_dir" / "swallowed").exists()
    d.order(job.run, Go())  # over: without effect


def test_a_function_asked_to_save_says_that_there_is_nothing(drive: Drives) -> None:
    d = drive()
    job = d.launch("t", {"do": "report", "n": 2})
    d.event(job.run, Reported)
    d.order(job.run, Go(save=True))
    assert d.event(job.run, Saved) == Saved(run=job.run, iteration=1, checkpoint=None)
    d.order(job.run, Go())
    d.until(lambda: len(d.of(job.run, Reported)) == 2)
    d.order(job.run, Stop(save=True))
    d.until(lambda: len(d.of(job.run, Saved)) == 2)
    d.order(job.run, Go())
    assert isinstance(d.last(job.run)[0], Ended)
    assert len(d.of(job.run, Reported)) == 2


def test_an_exception_becomes_one_line_and_a_traceback_of_the_trials_own_code(drive: Drives) -> None:
    results, end = drive().run("t", {"do": "raise"})
    assert len(results) == 1
    assert end.error == "ValueError: first line"
    assert not end.killed
    assert end.traceback.startswith("Traceback")
    assert "do_raise" in end.traceback
    assert "second line" in end.traceback
    assert "worker.py" not in end.traceback


@pytest.mark.parametrize(
    ("do", "error"),
    [("unspeakable", "UnspeakableError: "), ("exit", "SystemExit: 3"), ("interrupt", "KeyboardInterrupt")],
)
def test_whatever_a_trial_raises_is_its_own_failure(drive: Drives, do: str, error: str) -> None:
    _, end = drive().run("t", {"do": do})
    assert isinstance(end, Failed)
    assert end.error.startswith(error)
    assert not end.killed


def test_trials_share_what_there_is_and_give_it_back(drive: Drives) -> None:
    d = drive()
    assert d.executor.total == TOTAL
    one = d.launch("one", {"do": "report"}, resources={"cpu": 3.0, "gpu": 1.0, "licence": 1.0})
    d.event(one.run, Reported)
    assert d.executor.fits({"cpu": 1.0, "gpu": 1.0})
    assert not d.executor.fits({"cpu": 1.5})
    assert not d.executor.fits({"licence": 1.0})
    assert not d.executor.fits({"gpu": 2.0})
    with pytest.raises(UsageError, match="free"):
        d.launch("two", {"do": "report"}, resources={"cpu": 2.0})
    d.last(one.run, answer=lambda event: Stop())
    assert d.executor.fits(TOTAL)
    assert not d.executor.fits({"cpu": 100.0})
    assert not d.executor.fits({"tpu": 1.0})
    assert d.executor.why_never(TOTAL) is None
    assert "asks for 100 cpu (there are 4)" in str(d.executor.why_never({"cpu": 100.0}))
    assert "asks for 1 tpu (what there is: cpu, gpu, licence)" in str(d.executor.why_never({"tpu": 1.0}))
    assert "several whole ones" in str(d.executor.why_never({"gpu": 1.5}))


def test_a_killed_trial_fails_and_the_others_go_on(drive: Drives) -> None:
    d = drive()
    one, two = d.launch("one", {"do": "report"}), d.launch("two", {"do": "report"})
    d.event(one.run, Reported), d.event(two.run, Reported)
    d.executor.kill(one.run)
    (end,) = d.last(one.run, answer=lambda event: None)
    assert isinstance(end, Failed)
    assert end.killed
    assert len(d.of(one.run, Reported)) == 1
    d.order(two.run, Go())
    assert isinstance(d.last(two.run)[0], Ended)
    d.executor.kill(one.run)
    unstarted = d.launch("three", {"do": "report"})
    d.executor.kill(unstarted.run)
    assert d.last(unstarted.run)[0].killed
    assert d.executor.fits(TOTAL)


# ------------------------------------------------------------------------------------------------- classes


def test_a_class_trains_until_it_says_done_and_cleans_up(drive: Drives) -> None:
    d = drive("Counter")
    results, end = d.run("t", {"end": 3, "x": 1})
    assert [e.iteration for e in results] == [1, 2, 3]
    assert results[0].metrics == {
        "n": 1,
        "x": 1,
        "cwd": str(d.root / "t" / "working_dir"),
    }  # automatic fields are the driver's
    assert results[2].metrics["done"] is True
    assert isinstance(end, Ended)
    assert (d.root / "t" / "working_dir" / "cleaned").read_text() == "t"


@pytest.mark.parametrize("fail", ["setup", "step"])
def test_a_class_that_raises_fails_and_cleans_up_what_was_set_up(drive: Drives, fail: str) -> None:
    d = drive("Counter")
    _, end = d.run("t", {"fail": fail})
    assert end.error == f"ValueError: {fail} failed"
    assert (d.root / "t" / "working_dir" / "cleaned").exists() == (fail == "step")


def test_one_process_runs_trial_after_trial_if_the_class_can(drive: Drives) -> None:
    d = drive("Counter")
    first = d.launch("first", {"x": 1})
    second = d.job("second", {"x": 2, "end": 2}, iteration=5, time_total_s=10.0)
    d.event(first.run, Reported)
    d.order(first.run, Next(job=second))
    (end,) = d.last(second.run)
    assert isinstance(end, Ended)
    assert d.of(first.run)[-1] == Ended(run=first.run)
    assert [type(e) for e in d.of(second.run)] == [Started, Reported, Reported, Ended]
    assert d.of(first.run, Started)[0].pid == d.of(second.run, Started)[0].pid
    assert [(e.iteration, e.metrics["n"], e.metrics["x"]) for e in d.of(second.run, Reported)] == [
        (6, 1, 2),
        (7, 2, 2),
    ]
    assert d.of(second.run, Reported)[0].metrics["cwd"] == str(d.root / "second" / "working_dir")
    assert (d.root / "second" / "working_dir" / "cleaned").read_text() == "second"
    assert not (d.root / "first" / "working_dir" / "cleaned").exists()
    assert d.executor.fits(TOTAL)


def test_a_class_that_cannot_become_another_trial_is_started_anew(drive: Drives, kind: Kind) -> None:
    d = drive("Counter")
    first = d.launch("first", {"x": 1})
    second = d.job("second", {"x": 2, "end": 1, "resets": False})
    d.event(first.run, Reported)
    d.order(first.run, Next(job=second))
    assert isinstance(d.last(second.run)[0], Ended)
    assert d.of(first.run)[-1] == Ended(run=first.run)
    assert (d.root / "first" / "working_dir" / "cleaned").read_text() == "first"
    assert [e.metrics["x"] for e in d.of(second.run, Reported)] == [2]
    if kind.processes:
        assert d.of(first.run, Started)[0].pid != d.of(second.run, Started)[0].pid
    assert d.executor.fits(TOTAL)


def test_what_reset_config_raises_is_the_new_trials_failure(drive: Drives) -> None:
    d = drive("Counter")
    first, second = d.launch("first"), d.job("second", {"fail": "reset"})
    d.event(first.run, Reported)
    d.order(first.run, Next(job=second))
    (end,) = d.last(second.run)
    assert end.error == "ValueError: reset failed"
    assert d.of(first.run)[-1] == Ended(run=first.run)


def test_a_function_asked_to_go_on_as_another_trial_is_started_anew(drive: Drives) -> None:
    d = drive()
    first, second = d.launch("first", {"do": "report"}), d.job("second", {"do": "report", "n": 1})
    d.event(first.run, Reported)
    d.order(first.run, Next(job=second))
    assert isinstance(d.last(second.run)[0], Ended)
    assert d.of(first.run)[-1] == Ended(run=first.run)


def test_a_class_without_save_checkpoint_is_told_when_it_has_to_save(drive: Drives) -> None:
    d = drive("Forgetful")
    job = d.launch("asked")
    d.event(job.run, Reported)
    d.order(job.run, Go(save=True))
    assert d.event(job.run, Saved).checkpoint is None
    d.order(job.run, Stop())
    assert isinstance(d.last(job.run)[0], Ended)
    _, end = d.run("by_frequency", checkpoint_frequency=1)
    assert "checkpoint_frequency" in end.error
    assert "save_checkpoint" in end.error
