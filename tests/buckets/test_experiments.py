"""Experiments in a bucket, on a real S3 server: their journal, their checkpoints, drivers that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.buckets.server import Server

from keepstep import tune
from keepstep.checkpoint.place.registry import open_objects
from keepstep.errors import ExperimentBusyError, ExperimentNotFoundError, JournalError
from keepstep.tune.experiment.bucket_log import BucketLog
from keepstep.tune.experiment.reading import read_experiment
from keepstep.tune.experiment.records import DriverStarted, ResultReported, TrialMade


def lines(count: int, begin: int = 0) -> list[bytes]:
    return [f"line {number}\n".encode() for number in range(begin, begin + count)]


def test_a_journal_is_read_as_it_was_appended_in_few_requests_however_long_it_is(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = server.options()
    with pytest.raises(ExperimentNotFoundError, match="holds no experiment"):
        BucketLog(address, options).read()
    log = BucketLog(address, options, merge_every=10)
    for line in lines(17):
        log.append(line)
    again = BucketLog(address, options, merge_every=10)
    assert again.read() == b"".join(lines(17))
    for line in lines(7, 17):  # three of them are merged with seven of the one before
        again.append(line)
    kind: Any = type(open_objects(address, options))
    got: list[str] = []
    real: Callable[..., bytes] = kind.get
    monkeypatch.setattr(kind, "get", lambda self, key: (got.append(key), real(self, key))[1])
    assert BucketLog(address, options).read() == b"".join(lines(24))
    assert sorted(got) == [
        *(f"journal-merged/{begin:010d}-{begin + 9:010d}.jsonl" for begin in (0, 10)),
        *(f"journal/{number:010d}.jsonl" for number in range(20, 24)),
    ]
    assert len(list(open_objects(address, options).list("journal"))) == 24


def test_one_process_at_a_time_appends_and_one_that_was_shut_out_stays_so(
    server: Server, address: str
) -> None:
    options = server.options()
    first = BucketLog(address, options, merge_every=5)
    for line in lines(3):
        first.append(line)
    second = BucketLog(address, options, merge_every=5)
    second.read()
    for line in lines(9, 3):
        second.append(line)
    for _ in range(2):
        with pytest.raises(ExperimentBusyError, match="another process"):
            first.append(b"lost\n")
    assert BucketLog(address, options).read() == b"".join(lines(12))


def test_an_append_whose_answer_was_lost_is_not_taken_for_another_process(
    server: Server, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = BucketLog(address, server.options())
    kind: Any = type(open_objects(address, server.options()))
    real: Callable[..., bool] = kind.create
    monkeypatch.setattr(kind, "create", lambda self, *a: (real(self, *a), real(self, *a))[1])
    for line in lines(2):
        log.append(line)
    assert BucketLog(address, server.options()).read() == b"".join(lines(2))


def test_an_object_that_was_deleted_from_a_journal_is_missed(server: Server, address: str) -> None:
    log = BucketLog(address, server.options())
    for line in lines(4):
        log.append(line)
    open_objects(address, server.options()).delete(["journal/0000000001.jsonl"])
    with pytest.raises(JournalError, match=r"0000000001\.jsonl is missing"):
        BucketLog(address, server.options()).read()


# ----------------------------------------------------------------------------------------- checkpoints


def counts(config: dict[str, Any]) -> None:
    """Its checkpoints are directories, or states."""
    import torch

    start = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None and config["state"]:
        start = int(checkpoint.load()["w"][0])
    elif checkpoint is not None:
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, "w").read_text())
    for step in range(start, 4):
        made: Any = {"w": torch.full((3,), step + 1.0)}
        if not config["state"]:
            Path("here").mkdir(exist_ok=True)
            Path("here", "w").write_text(str(step + 1))
            made = tune.Checkpoint.from_directory("here")
        if step == 2 and checkpoint is None:
            raise ValueError("once")
        tune.report({"step": step}, checkpoint=made)


class Counts(tune.Trainable):
    def setup(self, config: dict[str, Any]) -> None:
        self.n = 0

    def step(self) -> dict[str, Any]:
        self.n += 1
        if self.n == 3 and self.iteration == 2 and not getattr(self, "loaded", False):
            raise ValueError("once")
        return {"step": self.n - 1, "done": self.n == 4}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"n": self.n}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.n, self.loaded = checkpoint["n"], True


@pytest.mark.parametrize("kind", ["directory", "state", "class"])
def test_trials_go_on_from_checkpoints_in_a_bucket_and_only_what_is_kept_stays(
    server: Server, address: str, kind: str
) -> None:
    options = server.options()
    rules = tune.CheckpointConfig(num_to_keep=2, checkpoint_frequency=1 if kind == "class" else 0)
    grid = tune.Tuner(
        Counts if kind == "class" else counts,
        param_space={"state": kind == "state"},
        run_config=tune.RunConfig(
            name="it",
            storage_path=address,
            storage_options=options,
            executor="inline",
            verbose=0,
            checkpoint_config=rules,
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    ).fit()
    (result,) = grid
    assert result.error is None
    assert result.metrics["step"] == 3
    assert result.path.startswith(f"{address}/it/")
    assert result.metrics_dataframe["step"].tolist() == [0, 1, 2, 3]
    objects = open_objects(result.path, options)
    keys = {found.key for found in objects.list()}
    assert {key.partition("/")[0] for key in keys if "/" in key} == {"checkpoint_000002", "checkpoint_000003"}
    assert {"result.json", "progress.csv", "params.json", "error.txt"} <= keys
    if kind == "directory":
        with result.checkpoint.as_directory() as directory:
            assert Path(directory, "w").read_text() == "4"
    elif kind == "state":
        assert result.checkpoint.load()["w"].tolist() == [4.0] * 3


# ---------------------------------------------------------------------------------- drivers that are killed

SCRIPT = """
import json, sys, time
from pathlib import Path
from keepstep import tune

def train(config):
    print("hello")
    start = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            start = json.loads(Path(directory, "step").read_text()) + 1
    for step in range(start, 8):
        time.sleep(config["sleep"])
        Path("here").mkdir(exist_ok=True)
        Path("here", "step").write_text(json.dumps(step))
        saved = None if step % 2 else tune.Checkpoint.from_directory("here")
        tune.report({"loss": config["x"] + step * config["y"], "step": step}, checkpoint=saved)

if __name__ == "__main__":
    executor, address, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if executor == "restore":
        tune.Tuner.restore(f"{address}/it", train, storage_options=options).fit()
        sys.exit("restored")
    tune.Tuner(
        train,
        param_space={"x": tune.uniform(0, 1), "y": tune.uniform(-1, 1), "sleep": float(sys.argv[4])},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", num_samples=6, max_concurrent_trials=2, seed=7,
            scheduler=tune.schedulers.ASHAScheduler(max_t=8, grace_period=2, reduction_factor=2),
        ),
        run_config=tune.RunConfig(
            name="it", storage_path=address, storage_options=options, executor=executor, verbose=0,
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ),
    ).fit()
    print("done")
"""


CLI = "from keepstep.cli.main import main; main()"


def start(script: Path, executor: str, address: str, server: Server, sleep: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), executor, address, json.dumps(server.options()), str(sleep)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=script.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(script.parent)},
    )


def results(address: str, server: Server) -> list[Any]:
    """What was decided of each result."""
    try:
        records = read_experiment(f"{address}/it", server.options())
    except ExperimentNotFoundError:
        return []
    return [record for record in records if isinstance(record, ResultReported)]


def decisions(address: str, server: Server) -> list[Any]:
    """By trial: what was tried, and what was decided of each result."""
    found: dict[str, list[Any]] = {}
    for record in read_experiment(f"{address}/it", server.options()):
        if isinstance(record, TrialMade):
            found.setdefault(record.trial[-5:], []).append(record.config["x"])
        elif isinstance(record, ResultReported):
            found.setdefault(record.trial[-5:], []).append(
                [record.iteration, record.metrics, record.decision]
            )
    return sorted(found.items())


def test_a_driver_that_is_killed_goes_on_in_the_bucket_and_decides_the_same(
    server: Server, address: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    whole, killed = f"{address}/whole", f"{address}/killed"
    undisturbed = start(script, "inline", whole, server, 0.0)
    for least in (5, 14):
        process = start(script, "inline", killed, server, 0.05)
        end = time.monotonic() + 60
        while len(results(killed, server)) < least:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.kill()
        process.communicate()
    last = start(script, "inline", killed, server, 0.05).communicate(timeout=120)[0]
    assert last.endswith("done\n")
    assert undisturbed.communicate(timeout=120)[0].endswith("done\n")
    assert decisions(killed, server) == decisions(whole, server)
    grid = tune.Tuner.restore(
        f"{killed}/it", _train_of(script), storage_options=server.options()
    ).get_results()
    assert len(grid) == 6
    for result in grid:
        told = open_objects(result.path, server.options()).get("result.json").splitlines()
        assert [json.loads(line)["training_iteration"] for line in told] == list(range(1, len(told) + 1))
        with result.checkpoint.as_directory() as directory:
            assert json.loads(Path(directory, "step").read_text()) % 2 == 0
    listed = subprocess.run(
        [sys.executable, "-c", CLI, "tune", "ls", f"{killed}/it"],
        env=server.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.count("TERMINATED") >= 6


def test_a_driver_that_is_killed_is_followed_by_one_on_another_machine(
    server: Server, address: str, tmp_path: Path
) -> None:
    for machine in ("one", "other"):
        (tmp_path / machine).mkdir()
        (tmp_path / machine / "script.py").write_text(SCRIPT)
    process = start(tmp_path / "one" / "script.py", "local", address, server, 0.1)
    end = time.monotonic() + 60
    while len(results(address, server)) < 9:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    before = decisions(address, server)
    shutil.rmtree(tmp_path / "one")
    restored = start(tmp_path / "other" / "script.py", "restore", address, server, 0.1)
    assert restored.communicate(timeout=120)[0].endswith("restored\n")
    after = dict(decisions(address, server))
    assert len(after) == 6
    for trial, told in before:
        assert after[trial][: len(told)] == told
    for told in after.values():
        assert [iteration for iteration, *_ in told[1:]] == list(range(1, len(told)))
    records = read_experiment(f"{address}/it", server.options())
    second = [n for n, record in enumerate(records) if isinstance(record, DriverStarted)][1]
    went_on = [found for found in records[second:] if isinstance(found, ResultReported)]
    assert any(found.since < found.iteration for found in went_on)  # from a checkpoint
    train = _train_of(tmp_path / "other" / "script.py")
    grid = tune.Tuner.restore(f"{address}/it", train, storage_options=server.options()).get_results()
    assert {result.ended_by for result in grid} <= {"itself", "scheduler"}
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["script.py"]


def _train_of(script: Path) -> Any:
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(script.read_text(), str(script), "exec"), names)
    return names["train"]


def test_what_trials_in_processes_print_is_in_the_bucket_and_nothing_lies_about(
    server: Server, address: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert start(script, "local", address, server, 0.0).communicate(timeout=120)[0] == "done\n"
    objects = open_objects(f"{address}/it", server.options())
    printed = [found.key for found in objects.list() if found.key.endswith("/stdout")]
    assert len(printed) == 6
    assert all(objects.get(key) == b"hello\n" for key in printed)
    analysis = tune.ExperimentAnalysis(f"{address}/it/", storage_options=server.options())
    assert [trial.status for trial in analysis.trials] == ["TERMINATED"] * 6
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]
