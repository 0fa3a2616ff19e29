"""Files of trials whose storage is a bucket: a real S3 server, and one that is gone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.buckets.server import Server
from tests.cli.processes import run
from tests.tune.made_trials import make_result, make_trial

from keepstep import tune
from keepstep.checkpoint.place.registry import open_objects
from keepstep.tune import Result
from keepstep.tune.logger.files import TrialFiles


def test_files_are_uploaded_while_a_trial_runs_and_when_it_ends(server: Server, address: str) -> None:
    options = server.options()
    trial = make_trial(address)
    files = TrialFiles(address, options, upload_every_s=0.0)
    files.start(trial)
    files.add(trial, make_result(trial, 1, loss=2.0))
    files.flush()
    files.close()  # the driver ends; the trial has not
    objects = open_objects(trial.path, options)
    assert json.loads(objects.get("result.json"))["loss"] == 2.0

    first = dict(trial.last_result)
    files = TrialFiles(address, options)
    files.rebuild(trial, [first])
    files.add(trial, make_result(trial, 2, loss=1.0))
    files.flush()
    assert objects.get("result.json").count(b"\n") == 1  # not due yet
    trial.num_failures = 1
    files.failed(trial, "Traceback\nValueError: no", 1.8e9)
    files.end(trial)
    directory = files.directory(trial)
    files.close()
    assert not directory.exists()
    assert objects.get("progress.csv").count(b"\n") == 3
    result = Result.from_path(trial.path, storage_options=options)
    assert (result.metrics["loss"], result.config) == (1.0, trial.config)
    assert "ValueError: no" in str(result.error)
    assert result.metrics_dataframe["loss"].tolist() == [2.0, 1.0]


def test_what_a_bucket_has_is_not_uploaded_again(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = server.options()
    trials = [make_trial(address, number) for number in range(3)]
    files = TrialFiles(address, options)
    results = {trial.trial_id: [make_result(trial, 1, loss=1.0)] for trial in trials}
    for trial in trials:
        files.start(trial)
        files.add(trial, results[trial.trial_id][0])
        files.end(trial)
    files.close()
    open_objects(address, options).delete([f"{trials[1].dirname}/result.json"])

    files = TrialFiles(address, options)
    put: list[str] = []
    kind: Any = type(files._uploads._objects)  # type: ignore[union-attr]
    real: Callable[..., None] = kind.put
    monkeypatch.setattr(kind, "put", lambda self, key, data: (put.append(key), real(self, key, data))[1])
    for trial in trials:
        trial.status = "TERMINATED"
        files.rebuild(trial, results[trial.trial_id])
    files.close()
    assert set(put) == {
        f"{trials[1].dirname}/{name}" for name in ("result.json", "progress.csv", "params.json")
    }


def test_a_bucket_that_is_gone_is_said_and_waited_for_no_longer_than_its_time(
    address: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    options = {
        "endpoint": "http://127.0.0.1:1",
        "access_key_id": "a",
        "secret_access_key": "b",
        "max_retries": 0,
        "retry_timeout_s": 0.1,
    }
    trial = make_trial(address)
    files = TrialFiles(address, options)
    files.start(trial)
    files.add(trial, make_result(trial, 1, loss=1.0))
    with caplog.at_level(logging.WARNING):
        files.end(trial)
        files.close()
        files.close()
    assert "can't be uploaded" in caplog.text
    assert "the files of 1 trial(s) could not be uploaded" in caplog.text


def test_an_experiment_in_a_bucket_is_run_looked_at_and_listed(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: dict[str, float]) -> None:
        for step in (1, 2):
            tune.report({"loss": config["lr"] / step}, checkpoint={"step": step})

    results = tune.Tuner(
        train,
        param_space={"lr": tune.grid_search([1.0, 0.5])},
        tune_config=tune.TuneConfig(metric="loss", mode="min"),
        run_config=tune.RunConfig(
            name="e", storage_path=address, storage_options=server.options(), executor="inline", verbose=0
        ),
    ).fit()
    best = results.get_best_result(scope="avg")
    assert best.config == {"lr": 0.5}
    assert best.metrics_dataframe["loss"].tolist() == [0.5, 0.25]
    assert best.checkpoint is not None
    assert best.checkpoint.load() == {"step": 2}
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    shown = run("tune", "best", f"{address}/e", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["value"], found["path"]) == (0.25, best.path)
    assert found["checkpoint"].startswith(best.path)
    assert run("tune", "ls", f"{address}/e").stdout.count("TERMINATED") == 2
