"""Callbacks that log trials to the trackers of other projects, the real ones, offline."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.tune.made_trials import make_result, make_trial

from keepstep.errors import MissingPackageError
from keepstep.tune import logger
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.logger import (
    CSVLoggerCallback,
    JsonLoggerCallback,
    LoggerCallback,
    MLflowLoggerCallback,
    TBXLoggerCallback,
    WandbLoggerCallback,
)
from keepstep.tune.logger.files import TrialFiles


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("lost", [True, False])
def test_tensorboard_shows_every_number_of_a_trial_that_went_on(tmp_path: Path, lost: bool) -> None:
    files, trial = TrialFiles(str(tmp_path)), make_trial(tmp_path)
    callback = TBXLoggerCallback()
    callback.on_trial_start(0, [trial], trial)
    for iteration in (1, 2):
        result = make_result(trial, iteration, loss=1.0 / iteration, eval={"acc": 0.5}, note="text")
        files.add(trial, result)
        callback.on_trial_result(0, [trial], trial, result)
    files.flush()
    callback.on_experiment_end([trial])
    if lost:  # as by a kill before they were written
        next((tmp_path / "train_00000").glob("events.*")).write_bytes(b"")

    callback = TBXLoggerCallback()
    callback.on_trial_start(0, [trial], trial)
    callback.on_trial_result(0, [trial], trial, make_result(trial, 3, loss=0.25, eval={"acc": 0.75}))
    callback.on_trial_complete(0, [trial], trial)
    directory = tmp_path / "train_00000"
    assert scalars(directory, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert scalars(directory, "eval/acc") == [(1, 0.5), (2, 0.5), (3, 0.75)]
    assert len(list(directory.glob("events.*"))) == 1


def test_tensorboard_needs_no_torch() -> None:
    code = "import sys\nfrom keepstep.tune.logger import TBXLoggerCallback\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_mlflow_has_a_run_for_each_trial_and_goes_on_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # making a database takes seconds
    uri = str(tmp_path / "mlflow")
    first, second = make_trial(tmp_path, 0), make_trial(tmp_path, 1)
    for steps in ((1, 2), (2, 3)):  # killed in between; the second driver hears the last result again
        callback = MLflowLoggerCallback(uri, experiment_name="digits", tags={"who": "me"})
        callback.setup()
        for trial in (first, second):
            callback.on_trial_start(0, [], trial)
        for step in steps:
            for trial in (first, second):
                callback.on_trial_result(0, [], trial, make_result(trial, step, loss=step + trial.number))
    callback.on_trial_complete(0, [], first)
    callback.on_trial_error(0, [], second)
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    found = {run.data.tags["trial_id"]: run for run in runs}
    assert len(runs) == 2
    assert [found[trial.trial_id].info.status for trial in (first, second)] == ["FINISHED", "FAILED"]
    assert found[second.trial_id].data.params == {"lr": "0.1", "layer.width": "1"}
    history = client.get_metric_history(found[second.trial_id].info.run_id, "loss")
    assert [(entry.step, entry.value) for entry in history] == [(1, 2.0), (2, 3.0), (3, 4.0)]


def test_wandb_has_a_run_for_each_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    trials = [make_trial(tmp_path, number) for number in range(2)]
    callback = WandbLoggerCallback("project", excludes=["node_ip", "layer"])
    for trial in trials:
        callback.on_trial_start(0, trials, trial)
    seen = [callback._trackers[trial.trial_id].tracker for trial in trials]
    for trial in trials:
        callback.on_trial_result(0, trials, trial, make_result(trial, 1, loss=float(trial.number)))
    assert [run.id for run in seen] == [trial.trial_id for trial in trials]
    assert json.loads(json.dumps(dict(seen[0].config))) == {"lr": 0.1}
    callback.on_trial_complete(0, trials, trials[0])
    callback.on_trial_error(0, trials, trials[1])
    end = time.monotonic() + 20  # wandb's own process may write after the run has ended
    while True:
        written = [path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
        there = [b"training_iteration" in data for data in written]
        if there == [True, True] or time.monotonic() > end:
            break
        time.sleep(0.05)
    assert there == [True, True]
    assert not any(b"node_ip" in data for data in written)


def test_a_callback_of_ones_own_is_told_in_the_words_of_a_logger(tmp_path: Path) -> None:
    class Told(LoggerCallback):
        def __init__(self) -> None:
            self.words: list[str] = []

        def log_trial_start(self, trial: Trial) -> None:
            self.words.append("start")

        def log_trial_restore(self, trial: Trial) -> None:
            self.words.append("restore")

        def log_trial_save(self, trial: Trial) -> None:
            self.words.append("save")

        def log_trial_result(self, iteration: int, trial: Trial, result: dict[str, Any]) -> None:
            self.words.append(f"result {result['loss']}")

        def log_trial_end(self, trial: Trial, failed: bool = False) -> None:
            self.words.append(f"end {failed}")

    trial, told = make_trial(tmp_path), Told()
    told.on_trial_start(0, [trial], trial)
    told.on_trial_restore(0, [trial], trial)
    told.on_trial_result(0, [trial], trial, {"loss": 1})
    told.on_trial_save(0, [trial], trial)
    told.on_trial_complete(0, [trial], trial)
    told.on_trial_error(0, [trial], trial)
    assert told.words == ["start", "restore", "result 1", "save", "end False", "end True"]


def test_those_that_are_not_needed_are_accepted() -> None:
    for kind in (JsonLoggerCallback, CSVLoggerCallback):
        kind().setup(stop=None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for module in list(sys.modules):
        if module.startswith("tensorboard.") or module == "keepstep.tune.logger.tensorboard":
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(vars(logger), "TBXLoggerCallback", raising=False)
    with pytest.raises(MissingPackageError, match=r"pip install 'keepstep\[tensorboard\]'"):
        logger.TBXLoggerCallback  # noqa: B018
