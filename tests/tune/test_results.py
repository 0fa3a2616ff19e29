"""`Result`, `ResultGrid`, `ExperimentAnalysis`: what a script gets to see of its trials."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import pytest
from tests.tune.made_trials import make_checkpoint, make_history, make_result, make_trial

from keepstep.errors import (
    ExperimentNotFoundError,
    MissingPackageError,
    NoResultError,
    TrialError,
    UsageError,
)
from keepstep.tune import ExperimentAnalysis, Result, ResultGrid
from keepstep.tune.experiment.trial import ERROR, TERMINATED, Trial
from keepstep.tune.logger.files import TrialFiles

LOSSES = [[4.0, 1.0, 3.0], [5.0, 2.0, 2.0], [9.0, 9.0, math.nan]]
"""By trial."""


def write(root: Path, losses: list[list[float]] = LOSSES) -> list[Trial]:
    """Trials that ended, and their files."""
    files, trials = TrialFiles(str(root)), []
    for number, own in enumerate(losses):
        trial = make_trial(root, number, config={"lr": 0.1 * (number + 1), "layer": {"width": number}})
        files.start(trial)
        for iteration, loss in enumerate(own, 1):
            result = make_result(trial, iteration, loss=loss, eval={"acc": iteration / 10 + number})
            if iteration == len(own):
                result["done"] = True
            files.add(trial, result)
        files.end(trial)
        trial.status = TERMINATED
        trials.append(trial)
    return trials


def grid_of(root: Path, trials: list[Trial], **said: str) -> ResultGrid:
    return ResultGrid(make_history(root, trials), **said)


def test_a_grid_is_a_sequence_of_results(tmp_path: Path) -> None:
    trials = write(tmp_path)
    trials[1].status, trials[1].error, trials[1].traceback = ERROR, "ValueError: no", "Traceback ..."
    grid = grid_of(tmp_path, trials)
    assert (len(grid), grid.num_errors, grid.num_terminated) == (3, 1, 2)
    assert [result.metrics["loss"] for result in grid][:2] == [3.0, 2.0]
    assert grid[-1].path == str(tmp_path / "train_00002")
    assert [result.config["layer"]["width"] for result in grid[1:]] == [1, 2]
    assert grid.experiment_path == str(tmp_path)
    assert grid[0].error is None
    assert isinstance(grid[1].error, TrialError)
    assert "ValueError: no" in str(grid.errors[0])
    assert str(trials[1]) in str(grid.errors[0])
    assert "train_00000" in repr(grid)
    with pytest.raises(IndexError):
        grid[3]


@pytest.mark.parametrize(
    ("metric", "mode", "scope", "best"),
    [
        ("loss", "min", "last", 1),
        ("loss", "min", "all", 0),
        ("loss", "max", "all", 2),
        ("loss", "min", "avg", 0),
        ("loss", "min", "last-5-avg", 0),
        ("eval/acc", "max", "last", 2),
        ("eval/acc", "min", "last-10-avg", 0),
        ("training_iteration", "max", "last", 0),
    ],
)
def test_the_best_by_every_scope(tmp_path: Path, metric: str, mode: str, scope: str, best: int) -> None:
    grid = grid_of(tmp_path, write(tmp_path))
    assert grid.get_best_result(metric, mode, scope).config["layer"]["width"] == best


def test_the_experiments_metric_is_the_default(tmp_path: Path) -> None:
    trials = write(tmp_path)
    assert grid_of(tmp_path, trials, metric="loss", mode="min").get_best_result().path.endswith("00001")
    assert grid_of(tmp_path, trials[:1]).get_best_result().path.endswith("00000")


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({}, UsageError, 'pass metric="..." and mode="min" or "max"'),
        ({"metric": "loss"}, UsageError, "no mode"),
        ({"metric": "loss", "mode": "best"}, UsageError, "mode='best'; expected"),
        ({"metric": "loss", "mode": "min", "scope": "mean"}, UsageError, "'last-5-avg'"),
        ({"metric": "acc", "mode": "max"}, NoResultError, "they reported: eval/acc, loss"),
    ],
)
def test_what_can_not_be_told_is_said(
    tmp_path: Path, said: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words.replace("?", r"\?").replace("(", r"\(")):
        grid_of(tmp_path, write(tmp_path)).get_best_result(**said)


def test_nan_is_nobodys_best_unless_asked_for(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, write(tmp_path, [[math.nan], [math.inf]]))
    with pytest.raises(NoResultError, match="filter_nan_and_inf=False"):
        grid.get_best_result("loss", "min")
    assert grid.get_best_result("loss", "min", filter_nan_and_inf=False).path.endswith("00001")


def test_data_frames_hold_results_and_configurations(tmp_path: Path) -> None:
    trials = write(tmp_path)
    grid = grid_of(tmp_path, trials)
    last = grid.get_dataframe()
    assert last["loss"].tolist()[:2] == [3.0, 2.0]
    assert last["config/layer/width"].tolist() == [0, 1, 2]
    assert last["logdir"].tolist() == ["train_00000", "train_00001", "train_00002"]
    best = grid.get_dataframe(filter_metric="loss", filter_mode="min")
    assert best["loss"].tolist() == [1.0, 2.0, 9.0]
    assert best["training_iteration"].tolist() == [2, 2, 1]
    assert grid[0].metrics_dataframe["eval/acc"].tolist() == [0.1, 0.2, 0.3]
    with pytest.raises(UsageError, match="go together"):
        grid.get_dataframe(filter_metric="loss")


def test_without_pandas_an_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "keepstep.tune.frames", raising=False)
    grid = grid_of(tmp_path, write(tmp_path))
    with pytest.raises(MissingPackageError, match=r"pip install 'keepstep\[pandas\]'"):
        grid.get_dataframe()
    assert grid.rows()[0]["loss"] == 3.0


def test_checkpoints_of_a_trial(tmp_path: Path) -> None:
    trial = write(tmp_path)[0]
    for number, loss in enumerate([2.0, 0.5, math.nan, 1.0]):
        make_checkpoint(trial, number, number + 1, loss=loss)
        place = tmp_path / trial.dirname / f"checkpoint_{number:06d}" / "files"
        place.mkdir(parents=True)
        (place.parent / "manifest.json").write_text("{}")
    result = grid_of(tmp_path, [trial])[0]
    assert result._newest == "checkpoint_000003"
    assert [metrics["training_iteration"] for _, metrics in result._checkpoints] == [1, 2, 3, 4]
    with pytest.raises(NoResultError, match="they have: loss, time_total_s, training_iteration"):
        result.get_best_checkpoint("acc", "max")
    with pytest.raises(UsageError, match="mode='most'"):
        result.get_best_checkpoint("loss", "most")
    read = Result.from_path(tmp_path / trial.dirname)
    assert [at.rpartition("/")[2] for at, _ in read._checkpoints] == [
        f"checkpoint_{number:06d}" for number in range(4)
    ]


def test_a_result_from_a_path(tmp_path: Path) -> None:
    trial = write(tmp_path)[0]
    result = Result.from_path(tmp_path / trial.dirname)
    assert result.metrics["loss"] == 3.0
    assert result.config == trial.config
    assert (result.error, result.checkpoint) == (None, None)
    (tmp_path / trial.dirname / "error.txt").write_text("Failure # 1 (occurred at now)\nboom\n")
    assert Result.from_path(tmp_path / trial.dirname).error is None  # it was tried again, and came to its end
    lines = (tmp_path / trial.dirname / "result.json").read_text().splitlines()[:2]
    (tmp_path / trial.dirname / "result.json").write_text("\n".join(lines) + "\n{torn")
    failed = Result.from_path(str(tmp_path / trial.dirname))
    assert failed.metrics["loss"] == 1.0
    assert "boom" in str(failed.error)
    with pytest.raises(ExperimentNotFoundError, match="Name the directory of a trial"):
        Result.from_path(tmp_path)


def test_the_analysis_of_old_scripts(tmp_path: Path) -> None:
    trials = write(tmp_path)
    analysis = ExperimentAnalysis(make_history(tmp_path, trials), default_metric="loss", default_mode="min")
    assert analysis.best_trial is trials[1]
    assert analysis.best_config == trials[1].config
    assert analysis.best_result["loss"] == 2.0
    assert analysis.get_best_trial("eval/acc", "max", "all") is trials[2]
    assert analysis.get_best_config("loss", "min", scope="avg") == trials[0].config
    assert analysis.dataframe("loss", "min")["loss"].tolist() == [1.0, 2.0, 9.0]
    assert analysis.results_df.loc["e1_00001", "loss"] == 2.0
    assert analysis.best_result_df.index.tolist() == ["e1_00001"]
    assert len(analysis.best_dataframe) == 3
    assert set(analysis.trial_dataframes) == set(analysis.results) == set(analysis.get_all_configs())
    assert analysis.get_last_checkpoint(trials[0]) is None
    assert analysis.get_best_checkpoint(trials[0]) is None
    prefixed = analysis.get_all_configs(prefix=True)[trials[0].trial_id]
    assert prefixed == {f"config/{name}": value for name, value in trials[0].config.items()}


def test_ten_thousand_trials_cost_nothing_before_they_are_looked_at(tmp_path: Path) -> None:
    trials = [make_trial(tmp_path, number) for number in range(10_000)]
    for trial in trials:
        make_result(trial, 1, loss=float(trial.number))
    began = time.process_time()
    grid = grid_of(tmp_path, trials)
    assert grid.get_best_result("loss", "max").config["layer"]["width"] == 9999
    assert len(repr(grid)) < 20_000
    assert time.process_time() - began < 1.0
    assert json.dumps(grid.rows()[0])
