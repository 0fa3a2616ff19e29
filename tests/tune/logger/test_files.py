"""`result.json`, `progress.csv`, `params.json`, `error.txt`: what other tools read of a trial."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.tune.made_trials import make_result, make_trial

from keepstep.tune.logger.callback import FilesCallback
from keepstep.tune.logger.files import TrialFiles


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_are_there_after_a_flush_in_order_and_with_nan(tmp_path: Path) -> None:
    files, trial = TrialFiles(str(tmp_path)), make_trial(tmp_path)
    files.start(trial)
    files.add(trial, make_result(trial, 1, loss=2.0, eval={"acc": 0.5}))
    files.add(trial, make_result(trial, 2, loss=math.nan, eval={"acc": math.inf}))
    directory = tmp_path / "train_00000"
    assert not (directory / "result.json").exists()  # one write a turn
    files.flush()
    first, second = lines_of(directory / "result.json")
    assert (first["loss"], first["eval"], first["training_iteration"]) == (2.0, {"acc": 0.5}, 1)
    assert math.isnan(second["loss"])
    assert second["eval"]["acc"] == math.inf
    table = pd.read_csv(directory / "progress.csv")
    assert table["eval/acc"].tolist() == [0.5, math.inf]
    assert list(table.columns)[:2] == ["loss", "eval/acc"]
    assert json.loads((directory / "params.json").read_text()) == {"lr": 0.1, "layer": {"width": 0}}


def test_columns_that_come_later_lose_nothing(tmp_path: Path) -> None:
    files, trial = TrialFiles(str(tmp_path)), make_trial(tmp_path)
    files.add(trial, make_result(trial, 1, loss=1.0, note='a "b",\nc'))
    files.flush()
    files.add(trial, make_result(trial, 2, acc=0.7))
    files.add(trial, make_result(trial, 3, loss=0.5, top={"five": 0.9}))
    files.flush()
    files.add(trial, make_result(trial, 4, loss=0.25))
    files.flush()
    table = pd.read_csv(tmp_path / "train_00000" / "progress.csv")
    assert table["training_iteration"].tolist() == [1, 2, 3, 4]
    assert table["loss"].fillna(-1).tolist() == [1.0, -1, 0.5, 0.25]
    assert table["acc"].fillna(-1).tolist() == [-1, 0.7, -1, -1]
    assert table["top/five"].fillna(-1).tolist() == [-1, -1, 0.9, -1]
    assert table["note"][0] == 'a "b",\nc'


def test_what_json_has_no_name_for_is_written_for_people(tmp_path: Path) -> None:
    class Optimizer:
        def __repr__(self) -> str:
            return "Optimizer()"

    config = {
        "sizes": np.arange(3),
        "rate": np.float32(0.5),
        "of": {1: Optimizer()},
        7: None,
        "tags": {"b", "a"},
        "data": np.zeros(1_000_000),
    }
    trial = make_trial(tmp_path, config=config)
    files = TrialFiles(str(tmp_path))
    files.start(trial)
    assert json.loads((tmp_path / "train_00000" / "params.json").read_text()) == {
        "sizes": [0, 1, 2],
        "rate": 0.5,
        "of": {"1": "Optimizer()"},
        "7": None,
        "tags": ["a", "b"],
        "data": repr(np.zeros(1_000_000)),
    }
    files.add(trial, {"x": np.float64(1.5), "who": Optimizer(), "deep": {(1, 2): 3}})
    files.flush()
    assert lines_of(tmp_path / "train_00000" / "result.json") == [
        {"x": 1.5, "who": "Optimizer()", "deep": {"(1, 2)": 3}}
    ]


def test_a_new_configuration_replaces_the_old_one(tmp_path: Path) -> None:
    files, trial = TrialFiles(str(tmp_path)), make_trial(tmp_path)
    files.start(trial)
    trial.config = {"lr": 0.2}
    files.start(trial)
    assert json.loads((tmp_path / "train_00000" / "params.json").read_text()) == {"lr": 0.2}


def test_every_failure_is_told(tmp_path: Path) -> None:
    files, trial = TrialFiles(str(tmp_path)), make_trial(tmp_path)
    trial.num_failures = 1
    files.failed(trial, "Traceback ...\nValueError: first\n", 1.8e9)
    trial.num_failures = 2
    files.failed(trial, "killed by SIGKILL", 1.8e9 + 60)
    text = (tmp_path / "train_00000" / "error.txt").read_text()
    assert text.startswith("Failure # 1 (occurred at 2027-")
    assert "\nValueError: first\nFailure # 2 (" in text
    assert text.endswith("killed by SIGKILL\n")


def made(root: Path) -> tuple[TrialFiles, list[dict], dict[str, bytes]]:
    """Files of a trial with three results."""
    files, trial = TrialFiles(str(root)), make_trial(root)
    files.start(trial)
    results = [make_result(trial, i, loss=1.0 / i, **({"acc": i} if i > 1 else {})) for i in (1, 2, 3)]
    for result in results:
        files.add(trial, result)
        files.flush()
    return files, results, contents(root)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "train_00000").iterdir()}


@pytest.mark.parametrize("damage", ["torn", "behind", "ahead", "gone", "zeros", "none"])
def test_after_a_kill_the_files_are_made_anew_from_the_journal(tmp_path: Path, damage: str) -> None:
    _, results, whole = made(tmp_path)
    trial = make_trial(tmp_path)
    for name in ("result.json", "progress.csv"):
        path = tmp_path / "train_00000" / name
        if damage == "torn":
            path.write_bytes(whole[name][:-5])
        elif damage == "behind":
            path.write_bytes(b"".join(whole[name].splitlines(keepends=True)[:-1]))
        elif damage == "ahead":
            path.write_bytes(whole[name] + whole[name].splitlines(keepends=True)[-1])
        elif damage == "gone":
            path.unlink()
        elif damage == "zeros":
            path.write_bytes(b"\0" * len(whole[name]))
    before = {name: (tmp_path / "train_00000" / name).stat().st_ino for name in contents(tmp_path)}
    files = TrialFiles(str(tmp_path))
    files.rebuild(trial, results)
    assert contents(tmp_path) == whole
    if damage == "none":
        assert before == {name: (tmp_path / "train_00000" / name).stat().st_ino for name in before}
    files.add(trial, make_result(trial, 4, loss=0.1, new=1))
    files.flush()
    table = pd.read_csv(tmp_path / "train_00000" / "progress.csv")
    assert table["training_iteration"].tolist() == [1, 2, 3, 4]
    assert len(lines_of(tmp_path / "train_00000" / "result.json")) == 4


def test_a_trial_that_begins_anew_has_empty_files(tmp_path: Path) -> None:
    files, _, _ = made(tmp_path)
    trial = make_trial(tmp_path)
    files.rebuild(trial, [])
    files.add(trial, make_result(trial, 1, loss=9.0))
    files.flush()
    assert pd.read_csv(tmp_path / "train_00000" / "progress.csv")["loss"].tolist() == [9.0]
    assert len(lines_of(tmp_path / "train_00000" / "result.json")) == 1


def test_a_directory_that_vanishes_is_made_again(tmp_path: Path) -> None:
    files, _, _ = made(tmp_path)
    trial = make_trial(tmp_path)
    for path in (tmp_path / "train_00000").iterdir():
        path.unlink()
    (tmp_path / "train_00000").rmdir()
    files.add(trial, make_result(trial, 4, loss=0.1))
    files.flush()
    assert lines_of(tmp_path / "train_00000" / "result.json")[0]["training_iteration"] == 4


def test_a_place_that_refuses_is_said_once_and_loses_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, trial = TrialFiles(str(tmp_path)), make_trial(tmp_path)
    directory = tmp_path / "train_00000"
    (directory / "progress.csv").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        for iteration in (1, 2):
            files.add(trial, make_result(trial, iteration, loss=1.0))
            files.flush()
    assert len(caplog.records) == 1
    assert "train_00000" in caplog.text
    assert "Is a directory" in caplog.text
    (directory / "progress.csv").rmdir()
    files.end(trial)
    assert pd.read_csv(directory / "progress.csv")["training_iteration"].tolist() == [1, 2]
    assert len(lines_of(directory / "result.json")) == 2


def test_many_trials_cost_the_same_each(tmp_path: Path) -> None:
    files = TrialFiles(str(tmp_path))

    def some(begin: int) -> float:
        """Processor seconds a trial."""
        began = time.process_time()
        for number in range(begin, begin + 300):
            trial = make_trial(tmp_path, number)
            files.start(trial)
            files.add(trial, make_result(trial, 1, loss=1.0, acc=0.5))
            files.end(trial)
        return (time.process_time() - began) / 300

    first = min(some(begin) for begin in (0, 300))
    last = min(some(begin) for begin in (600, 900))
    print(f"{first * 1e6:.0f} and {last * 1e6:.0f} us a trial")
    assert last < 3 * first + 1e-4
    assert files._open == files._waiting == {}


def test_the_driver_tells_it_as_a_callback(tmp_path: Path) -> None:
    trial = make_trial(tmp_path)
    callback = FilesCallback(TrialFiles(str(tmp_path)))
    callback.on_trial_start(1, [trial], trial)
    result = make_result(trial, 1, loss=1.0)
    callback.on_trial_result(1, [trial], trial, result)
    result["done"] = True  # decided after everybody was told
    callback.on_step_end(1, [trial])
    directory = tmp_path / "train_00000"
    assert lines_of(directory / "result.json")[0]["done"] is True
    trial.num_failures, trial.error = 1, "ValueError: x"
    callback.on_trial_recover(1, [trial], trial)
    trial.num_failures, trial.traceback = 2, "Traceback (most recent call last):\nValueError: y"
    callback.on_trial_error(1, [trial], trial)
    callback.on_experiment_end([trial])
    text = (directory / "error.txt").read_text()
    assert text.splitlines()[1:2] + text.splitlines()[3:] == [
        "ValueError: x",
        "Traceback (most recent call last):",
        "ValueError: y",
    ]
