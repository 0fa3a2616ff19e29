"""Experiments from `Tuner.fit` to its results, on the executor that runs one trial at a time."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tune.running import run_config, tuner

from keepstep import tune
from keepstep.errors import (
    ExperimentBusyError,
    ExperimentExistsError,
    ExperimentNotFoundError,
    NoResultError,
    TrialError,
    TuneError,
    UsageError,
)
from keepstep.tune.assembly import opening
from keepstep.tune.assembly.opening import open_experiment
from keepstep.tune.executors.inline import InlineExecutor
from keepstep.tune.experiment import Trial, journal, reading
from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import TrialMade
from keepstep.tune.result import SHOULD_CHECKPOINT


def fit(
    tmp_path: Path,
    trainable: Any,
    space: dict[str, Any] | None = None,
    said: tune.TuneConfig | None = None,
    **more: Any,
) -> tune.ResultGrid:
    return tuner(tmp_path, trainable, space, said, **more).fit()


def lines(result: tune.Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(result.path, "result.json").read_text().splitlines()]


def counting(steps: int, *, every: int = 1, fail_at: int | None = None) -> Callable[[dict[str, Any]], None]:
    """A function that counts, and saves its count each so many steps; it fails once, when it began at 0."""

    def train(config: dict[str, Any]) -> None:
        start = 0
        checkpoint = tune.get_checkpoint()
        if checkpoint:
            with checkpoint.as_directory() as directory:
                start = json.loads(Path(directory, "count.json").read_text()) + 1
        for step in range(start, steps):
            if step == fail_at and start == 0:
                raise RuntimeError("no luck")
            metrics = {"loss": config.get("x", 0) - step, "step": step, "began": start}
            if step % every:
                tune.report(metrics)
                continue
            with tempfile.TemporaryDirectory() as directory:
                Path(directory, "count.json").write_text(json.dumps(step))
                tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))

    return train


class Counter(tune.Trainable):
    def setup(self, config: dict[str, Any]) -> None:
        self.count = 0

    def step(self) -> dict[str, Any]:
        self.count += 1
        return {"count": self.count, "done": self.count >= self.config.get("steps", 5)}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "count.json").write_text(json.dumps(self.count))

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.count = json.loads(Path(checkpoint, "count.json").read_text())


def test_every_combination_is_tried_and_the_best_is_found(tmp_path: Path) -> None:
    space = {"x": tune.grid_search([1, 2, 3]), "other": "same"}
    results = fit(tmp_path, counting(4), space, tune.TuneConfig(metric="loss", mode="min"))
    assert [result.config for result in results] == [{"x": x, "other": "same"} for x in (1, 2, 3)]
    assert (results.num_terminated, results.num_errors) == (3, 0)
    best = results.get_best_result()
    assert (best.config["x"], best.metrics["loss"], best.metrics["training_iteration"]) == (1, -2, 4)
    assert best.checkpoint is not None
    with best.checkpoint.as_directory() as directory:
        assert json.loads(Path(directory, "count.json").read_text()) == 3


def test_a_trial_that_failed_goes_on_from_its_last_checkpoint_and_no_result_is_told_twice(
    tmp_path: Path,
) -> None:
    failures = tune.FailureConfig(max_failures=1)
    (result,) = fit(tmp_path, counting(7, every=3, fail_at=5), failure_config=failures)
    told = lines(result)
    assert [line["training_iteration"] for line in told] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in told] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["began"] for line in told] == [0, 0, 0, 0, 0, 4, 4]
    assert result.error is None


def test_a_trial_that_fails_for_good_leaves_the_others_alone(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"a": 1})
        if config["x"] == 2:
            raise ValueError("two is bad")

    results = fit(tmp_path, train, {"x": tune.grid_search([1, 2, 3])})
    assert (results.num_terminated, results.num_errors) == (2, 1)
    assert "two is bad" in str(results.errors[0])
    assert "two is bad" in Path(results[1].path, "error.txt").read_text()


def test_fail_fast_starts_no_other_trial_and_raise_raises(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        raise ValueError(f"bad {config['x']}")

    space = {"x": tune.grid_search([1, 2, 3])}
    one = tune.TuneConfig(max_concurrent_trials=1)
    results = fit(tmp_path, train, space, one, name="a", failure_config=tune.FailureConfig(fail_fast=True))
    assert results.num_errors == 1
    with pytest.raises(TrialError, match="bad 1"):
        fit(tmp_path, train, space, one, name="b", failure_config=tune.FailureConfig(fail_fast="raise"))


@pytest.mark.parametrize(
    ("said", "iterations"),
    [
        ({"checkpoint_frequency": 2}, [2, 4, 5]),
        ({"checkpoint_frequency": 2, "checkpoint_at_end": False}, [2, 4]),
        ({}, [5]),
        ({"checkpoint_at_end": False}, []),
    ],
)
def test_a_class_saves_every_so_many_iterations_and_at_its_end(
    tmp_path: Path, said: dict[str, Any], iterations: list[int]
) -> None:
    (result,) = fit(tmp_path, Counter, checkpoint_config=tune.CheckpointConfig(**said))
    saved = sorted(Path(result.path).glob("checkpoint_*/files/count.json"))
    assert [json.loads(path.read_text()) for path in saved] == iterations


def test_a_result_and_a_callback_can_ask_a_class_for_a_checkpoint(tmp_path: Path) -> None:
    class Asks(Counter):
        def step(self) -> dict[str, Any]:
            return {**super().step(), "should_checkpoint": self.count == 2}

    class Watches(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
        ) -> None:
            assert trial in trials
            if result["training_iteration"] == 4:
                result[SHOULD_CHECKPOINT] = True

    never = tune.CheckpointConfig(checkpoint_at_end=False)
    (result,) = fit(tmp_path, Asks, checkpoint_config=never, callbacks=[Watches()])
    saved = sorted(Path(result.path).glob("checkpoint_*/files/count.json"))
    assert [json.loads(path.read_text()) for path in saved] == [2, 4]


@pytest.mark.parametrize("said", [{"checkpoint_frequency": 2}, {"checkpoint_at_end": True}])
def test_a_function_can_not_be_told_when_to_save(tmp_path: Path, said: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"train is a function.*Save from inside it"):
        tune.Tuner(
            counting(3), run_config=run_config(tmp_path, checkpoint_config=tune.CheckpointConfig(**said))
        )


def test_two_checkpoints_to_keep_are_the_best_and_what_is_needed_to_go_on(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def train(config: dict[str, Any]) -> None:
        for score in [5, 9, 1, 7, 2]:
            with tempfile.TemporaryDirectory() as directory:
                Path(directory, "score").write_text(str(score))
                tune.report({"score": score}, checkpoint=tune.Checkpoint.from_directory(directory))
            there = Path(tune.get_context().get_trial_dir()).parent.glob("checkpoint_*/files/score")
            seen.append(sorted(path.read_text() for path in there))

    kept = tune.CheckpointConfig(num_to_keep=2, checkpoint_score_attribute="score")
    (result,) = fit(tmp_path, train, checkpoint_config=kept)
    assert seen == [["5"], ["5", "9"], ["1", "9"], ["7", "9"], ["2", "9"]]
    assert [metrics["score"] for _, metrics in result.best_checkpoints or []] == [9, 2]


def test_an_experiment_of_the_same_name_goes_on_and_finished_trials_are_not_run_again(tmp_path: Path) -> None:
    ran: list[int] = []

    def train(config: dict[str, Any]) -> None:
        ran.append(config["x"])
        tune.report({"loss": config["x"]})

    space = {"x": tune.grid_search([1, 2])}
    fit(tmp_path, train, space)
    again = fit(tmp_path, train, space)
    assert ran == [1, 2]
    assert [result.metrics["loss"] for result in again] == [1, 2]
    more = fit(tmp_path, train, space, tune.TuneConfig(num_samples=2))
    assert (ran, len(more)) == ([1, 2, 1, 2], 4)


@pytest.mark.parametrize(
    ("space", "config", "named"),
    [
        ({"x": tune.uniform(0, 2)}, {"metric": "loss", "mode": "min"}, "param_space: x"),
        ({"x": tune.uniform(0, 1)}, {"metric": "acc", "mode": "min"}, "metric"),
        ({"x": tune.uniform(0, 1)}, {"metric": "loss", "mode": "max"}, "mode"),
    ],
)
def test_another_experiment_of_the_same_name_is_refused_and_nothing_of_the_first_is_touched(
    tmp_path: Path, space: dict[str, Any], config: dict[str, Any], named: str
) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"loss": config["x"]})

    fit(tmp_path, train, {"x": tune.uniform(0, 1)}, tune.TuneConfig(metric="loss", mode="min"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ExperimentExistsError, match=named):
        fit(tmp_path, train, space, tune.TuneConfig(**config))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_one_process_at_a_time_runs_an_experiment(tmp_path: Path) -> None:
    fit(tmp_path, counting(1))
    opened = open_experiment(str(tmp_path / "it"))
    try:
        with pytest.raises(ExperimentBusyError, match=f"process {os.getpid()} on"):
            fit(tmp_path, counting(1))
    finally:
        opened.release()


def test_failed_trials_go_on_or_begin_anew_when_a_restore_says_so(tmp_path: Path) -> None:
    results = fit(tmp_path, counting(4, fail_at=2), {"x": tune.grid_search([1, 2])})
    assert results.num_errors == 2
    path = tmp_path / "it"
    assert tune.Tuner.restore(str(path), counting(4), run_config=run_config(tmp_path)).fit().num_errors == 2
    on = tune.Tuner.restore(path, counting(4), resume_errored=True, run_config=run_config(tmp_path)).fit()
    assert (on.num_errors, [line["began"] for line in lines(on[0])]) == (0, [0, 0, 2, 2])


def test_a_restart_of_what_failed_begins_at_zero(tmp_path: Path) -> None:
    fit(tmp_path, counting(4, fail_at=2))
    config = run_config(tmp_path)
    again = tune.Tuner.restore(tmp_path / "it", counting(4), restart_errored=True, run_config=config).fit()
    assert [line["began"] for line in lines(again[0])][-4:] == [0, 0, 0, 0]
    assert again.num_errors == 0


def test_a_restore_needs_nothing_that_the_journal_can_tell(tmp_path: Path) -> None:
    space = {"x": tune.choice([1, 2, 3]), "y": tune.loguniform(1e-4, 1)}
    scheduler = tune.schedulers.ASHAScheduler(max_t=8, grace_period=2)
    config = tune.TuneConfig(metric="loss", mode="min", num_samples=3, scheduler=scheduler)
    first = fit(tmp_path, counting(3), space, config, stop={"training_iteration": 3})
    assert tune.Tuner.can_restore(tmp_path / "it")
    again = tune.Tuner.restore(tmp_path / "it", counting(3)).fit()
    assert [result.config for result in again] == [result.config for result in first]
    assert again.get_best_result().metrics["loss"] == first.get_best_result().metrics["loss"]


def test_a_restore_reads_the_journal_once_and_what_came_between_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"x": tune.grid_search([1, 2])}
    fit(tmp_path, counting(3), space)
    read: list[str] = []
    parse = journal.parse_journal

    def parsed(data: bytes, name: str) -> journal.Told:
        read.append(name)
        return parse(data, name)

    for module in (opening, reading):
        monkeypatch.setattr(module, "parse_journal", parsed)
    again = tune.Tuner.restore(tmp_path / "it", counting(3))
    late = tune.Tuner.restore(tmp_path / "it", counting(3))
    assert (again.fit().num_terminated, len(read)) == (2, 2)
    assert fit(tmp_path, counting(3), space, tune.TuneConfig(num_samples=2)).num_terminated == 4
    assert late.fit().num_terminated == 4


def test_a_restore_says_what_has_to_be_handed_over(tmp_path: Path) -> None:
    fit(tmp_path, counting(1), {"x": tune.sample_from(lambda spec: 3)}, stop=lambda trial_id, result: False)
    with pytest.raises(UsageError, match=r"run_config=RunConfig\(stop="):
        tune.Tuner.restore(tmp_path / "it", counting(1))
    with pytest.raises(UsageError, match=r"'x'.*hand over param_space again"):
        tune.Tuner.restore(tmp_path / "it", counting(1), run_config=run_config(tmp_path))
    assert not tune.Tuner.can_restore(tmp_path / "nothing")
    with pytest.raises(ExperimentNotFoundError, match="holds no experiment"):
        tune.Tuner.restore(tmp_path / "nothing", counting(1))


def test_configurations_may_hold_what_json_does_not(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"loss": config["activation"](-2.0), "half": config["pair"][0]})
        raise RuntimeError("later")

    drawn = tune.choice(np.arange(3, 4))  # of numpy's
    space = {"activation": tune.grid_search([abs, float]), "pair": (1, 2), "width": drawn}
    assert [r.metrics["loss"] for r in fit(tmp_path, train, space)] == [2.0, -2.0]
    again = tune.Tuner.restore(
        tmp_path / "it", train, resume_errored=True, param_space=space, run_config=run_config(tmp_path)
    ).fit()
    assert [result.config["activation"] for result in again] == [abs, float]
    assert again[0].config["pair"] == (1, 2)
    made = [record for record in read_journal(tmp_path / "it") if isinstance(record, TrialMade)]
    assert [record.evaluated["width"] for record in made] == [3, 3]


def test_a_space_that_changed_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, counting(1), {"x": tune.grid_search([1, 2, 3])})
    other = {"y": tune.grid_search([1, 2, 3])}
    tune.Tuner.restore(tmp_path / "it", counting(1), param_space=other, run_config=run_config(tmp_path)).fit()
    first, rest, *_ = (record.getMessage() for record in caplog.records)
    assert "suggests {'y': 1}" in first
    assert "2 more trials" in rest


def test_a_name_too_long_for_a_directory_is_refused(tmp_path: Path) -> None:
    said = tune.TuneConfig(trial_dirname_creator=lambda trial: "n" * 300)
    with pytest.raises(UsageError, match="at most 240"):
        fit(tmp_path, counting(1), {}, said)


def test_time_is_over_when_the_budget_says_so(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        while True:
            time.sleep(0.02)
            tune.report({"a": 1})

    began = time.monotonic()
    config = tune.TuneConfig(time_budget_s=0.5, num_samples=-1, max_concurrent_trials=2)
    results = fit(tmp_path, train, {}, config)
    assert time.monotonic() - began < 5
    assert len(results) == results.num_terminated >= 1


def test_a_trial_that_asks_for_more_than_there_is_fails_by_name_and_others_go_on(tmp_path: Path) -> None:
    trainable = tune.with_resources(counting(1), lambda config: {"cpu": 10_000 if config["x"] == 1 else 1})
    results = fit(tmp_path, trainable, {"x": tune.grid_search([1, 2])})
    assert results.num_terminated == 1
    assert "asks for 10000 cpu" in str(results.errors[0])


def test_a_resource_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    trainable = tune.with_resources(counting(1), lambda config: {"cpus": 1})
    results = fit(tmp_path, trainable, {"x": tune.grid_search([1, 2])})
    assert ["asks for 1 cpus (what there is: cpu, " in str(error) for error in results.errors] == [True] * 2


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_what_all_trials_ask_for_and_is_never_there_is_said_once_before_anything_is_done(
    tmp_path: Path, executor: str
) -> None:
    space = {"x": tune.grid_search([1, 2])}
    with pytest.raises(UsageError, match=r"no trial can start.*it asks for 10000 cpu \(there are"):
        fit(tmp_path, tune.with_resources(counting(1), {"cpu": 10_000}), space, executor=executor)
    assert not list(tmp_path.glob("it/*/"))
    assert not tune.Tuner.can_restore(tmp_path / "it")
    assert fit(tmp_path, counting(1), space, executor=executor).num_terminated == 2
    done = fit(tmp_path, tune.with_resources(counting(1), {"cpu": 10_000}), space, executor=executor)
    assert done.num_terminated == 2  # there is nothing left to start


def test_an_executor_that_has_no_room_though_nothing_runs_is_named(tmp_path: Path) -> None:
    class Wrong(InlineExecutor):
        def fits(self, resources: Any) -> bool:
            return False

    with pytest.raises(TuneError, match=r"Wrong.fits says that there is no room"):
        fit(tmp_path, counting(1), executor=Wrong)
    assert fit(tmp_path, counting(1)).num_terminated == 1


def test_a_population_without_end_is_refused(tmp_path: Path) -> None:
    scheduler = tune.schedulers.PopulationBasedTraining(hyperparam_mutations={"x": tune.uniform(0, 1)})
    config = tune.TuneConfig(metric="loss", mode="min", num_samples=-1, time_budget_s=1, scheduler=scheduler)
    with pytest.raises(UsageError, match=r"PopulationBasedTraining.*num_samples=-1 is without end"):
        fit(tmp_path, counting(1), {}, config)


def test_a_metric_without_a_mode_is_said_when_the_experiment_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = fit(tmp_path, counting(3), {}, tune.TuneConfig(metric="loss"))
    (said,) = [text for text in caplog.messages if "no mode" in text]
    assert "metric='loss'" in said
    assert results.get_best_result(mode="min").metrics["loss"] == -2


def test_what_can_never_start_is_told_in_a_line_and_how_to_run_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, tune.with_resources(counting(1), lambda config: {"cpu": 10_000}), verbose=1)
    told = capsys.readouterr().out
    failed, advice, _ = told.splitlines()
    assert "ERROR: it asks for 10000 cpu" in failed
    assert f"Tuner.restore('{tmp_path / 'it'}', trainable, restart_errored=True).fit()" in advice


def test_a_callback_that_keeps_a_state_gets_it_back(tmp_path: Path) -> None:
    class Counts(tune.Callback):
        def __init__(self) -> None:
            self.seen = 0

        def on_trial_result(
            self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
        ) -> None:
            self.seen += 1

        def get_state(self) -> dict[str, Any]:
            return {"seen": self.seen}

        def set_state(self, state: Any) -> None:
            self.seen = state["seen"]

    space = {"x": tune.grid_search([1, 2])}
    fit(tmp_path, counting(3), space, callbacks=[Counts()])
    again = Counts()
    fit(tmp_path, counting(3), space, tune.TuneConfig(num_samples=2), callbacks=[again])
    assert again.seen == 12


def test_ray_s_interval_of_snapshots_is_accepted_and_said_to_be_unneeded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "5")
    tune.Tuner(counting(1))
    assert "TUNE_GLOBAL_CHECKPOINT_S is set, and not needed" in caplog.text


def test_a_result_that_nobody_can_compare_fails_its_trial_by_name_and_others_go_on(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"loss" if config["x"] == 1 else "lost": 1.0})
        tune.report({"loss": 0.5})

    config = tune.TuneConfig(metric="loss", mode="min", scheduler=tune.schedulers.ASHAScheduler())
    space = {"x": tune.grid_search([1, 2])}
    for _ in range(2):  # a second start tells everybody the same again
        results = fit(tmp_path, train, space, config)
        assert (results.num_terminated, results.num_errors) == (1, 1)
        assert "without the metric 'loss'" in str(results.errors[0])
        assert "'lost'" in str(results.errors[0])


def test_the_best_of_results_without_the_metric_is_an_error_that_names_it(tmp_path: Path) -> None:
    results = fit(tmp_path, counting(2), {}, tune.TuneConfig(metric="accuracy", mode="max"))
    with pytest.raises(NoResultError, match="accuracy"):
        results.get_best_result()


def test_callbacks_are_told_by_name(tmp_path: Path) -> None:
    told: list[set[str]] = []

    class TakesAll(tune.Callback):
        def on_trial_result(self, **info: Any) -> None:  # type: ignore[override]
            told.append(set(info))

    fit(tmp_path, counting(1), callbacks=[TakesAll()])
    assert told == [{"iteration", "trials", "trial", "result"}]


def test_a_class_that_can_be_reset_goes_on_with_the_next_trial(tmp_path: Path) -> None:
    made: list[int] = []

    class Resettable(Counter):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            made.append(config["x"])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.count = 0
            return True

    config = tune.TuneConfig(reuse_actors=True, max_concurrent_trials=1)
    results = fit(tmp_path, Resettable, {"x": tune.grid_search([1, 2, 3])}, config)
    assert made == [1]
    assert [result.metrics["count"] for result in results] == [5, 5, 5]
    assert [len(list(Path(result.path).glob("checkpoint_*"))) for result in results] == [1, 1, 1]


def test_a_paused_trial_goes_on_from_its_checkpoint_in_its_own_time(tmp_path: Path) -> None:
    scheduler = tune.schedulers.HyperBandScheduler(time_attr="training_iteration", max_t=9)
    config = tune.TuneConfig(metric="loss", mode="min", scheduler=scheduler, max_concurrent_trials=2)
    results = fit(tmp_path, counting(9), {"x": tune.grid_search(list(range(9)))}, config)
    assert results.num_errors == 0
    for result in results:
        told = [line["training_iteration"] for line in lines(result)]
        assert told == list(range(1, len(told) + 1))
    assert max(result.metrics["training_iteration"] for result in results) == 9
    assert min(result.metrics["training_iteration"] for result in results) < 9
