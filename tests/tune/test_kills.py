"""Drivers and trials that are killed, by real signals: nothing is lost, nothing is told twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import ResultReported, TrialMade

SCRIPT = """
import json, os, sys, tempfile, time
from pathlib import Path
from keepstep import tune

def train(config):
    start = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            start = json.loads(Path(directory, "step").read_text()) + 1
    for step in range(start, 10):
        time.sleep(config["sleep"])
        metrics = {"loss": config["x"] + step * config["y"], "step": step}
        if step % 3:
            tune.report(metrics)
            continue
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(json.dumps(step))
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))

executor, storage, sleep, slots = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
tune.Tuner(
    train,
    param_space={"x": tune.uniform(0, 1), "y": tune.uniform(-1, 1), "sleep": sleep},
    tune_config=tune.TuneConfig(
        metric="loss", mode="min", num_samples=8, max_concurrent_trials=slots, seed=7,
        scheduler=tune.schedulers.ASHAScheduler(max_t=10, grace_period=2, reduction_factor=2),
    ),
    run_config=tune.RunConfig(
        name="it", storage_path=storage, executor=executor, verbose=0,
        failure_config=tune.FailureConfig(max_failures=-1),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    ),
).fit()
print("done")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test; none outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def start(started: list[subprocess.Popen[str]], script: Path, *arguments: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    started.append(process)
    return process


def decisions(storage: Path) -> list[Any]:
    """What was tried, and what was decided of each result, by trial."""
    found: dict[str, list[Any]] = {}
    for record in read_journal(storage / "it"):
        if isinstance(record, TrialMade):
            found.setdefault(record.trial[-5:], []).append(record.config)
        elif isinstance(record, ResultReported):
            said = [record.iteration, record.metrics, record.decision]
            found.setdefault(record.trial[-5:], []).append(said)
    return sorted(found.items())


def iterations(storage: Path) -> dict[str, list[int]]:
    """Of each trial, the iterations in its result.json."""
    return {
        path.parent.name.split("_")[2]: [
            json.loads(line)["training_iteration"] for line in path.read_text().splitlines()
        ]
        for path in (storage / "it").glob("*/result.json")
    }


def test_a_driver_killed_again_and_again_decides_as_one_that_was_not(
    tmp_path: Path, script: Path, started: list[subprocess.Popen[str]]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(started, script, "inline", whole, 0.01, 2).communicate(timeout=120)[0] == "done\n"
    total = reported(whole)
    for results in sorted(random.Random(3).sample(range(1, total), 6)):
        process = start(started, script, "inline", killed, 0.01, 2)
        wait_for(lambda least=results: reported(killed) >= least)
        process.kill()
        process.communicate()
    assert start(started, script, "inline", killed, 0.01, 2).communicate(timeout=120)[0] == "done\n"
    assert decisions(killed) == decisions(whole)
    assert iterations(killed) == iterations(whole)


def children(pid: int) -> set[int]:
    """All processes below one."""
    below: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            below |= {int(child), *children(int(child))}
    return below


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def reported(storage: Path) -> int:
    try:
        return sum(isinstance(record, ResultReported) for record in read_journal(storage / "it"))
    except FileNotFoundError:
        return 0


def test_processes_of_trials_die_with_their_driver_and_no_result_is_lost_or_told_twice(
    tmp_path: Path, script: Path, started: list[subprocess.Popen[str]]
) -> None:
    storage = tmp_path / "runs"
    for results in (5, 12, 20):
        process = start(started, script, "local", storage, 0.05, 2)
        wait_for(lambda least=results: reported(storage) >= least)
        below = children(process.pid)
        process.kill()
        process.communicate()
        wait_for(lambda pids=below: not any(map(alive, pids)), 5.0)
    assert start(started, script, "local", storage, 0.05, 2).communicate(timeout=120)[0] == "done\n"
    for told in iterations(storage).values():
        assert told == list(range(1, len(told) + 1))
    assert len(iterations(storage)) == 8


def test_a_trial_that_is_killed_goes_on_from_its_checkpoint_while_others_train(
    tmp_path: Path, script: Path, started: list[subprocess.Popen[str]]
) -> None:
    storage = tmp_path / "runs"
    process = start(started, script, "local", storage, 0.05, 2)
    wait_for(lambda: reported(storage) >= 8)
    for _ in range(100):  # the trial that reported last, unless it has ended meanwhile
        results = [json.loads(line) for path in storage.glob("it/*/result.json") for line in path.open()]
        with contextlib.suppress(ProcessLookupError):
            os.kill(max(results, key=lambda result: result["timestamp"])["pid"], signal.SIGKILL)
            break
    assert process.communicate(timeout=120)[0] == "done\n"
    for told in iterations(storage).values():
        assert told == list(range(1, len(told) + 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + 15)])
def test_one_interrupt_lets_trials_report_and_the_next_start_goes_on(
    tmp_path: Path, script: Path, started: list[subprocess.Popen[str]], number: int, status: int
) -> None:
    storage = tmp_path / "runs"
    process = start(started, script, "local", storage, 0.05, 2)
    wait_for(lambda: reported(storage) >= 6)
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == status
    assert "interrupted: running trials report once more, save and stop" in output
    before = reported(storage)
    assert start(started, script, "local", storage, 0.05, 2).returncode is None
    assert started[-1].communicate(timeout=120)[0] == "done\n"
    assert reported(storage) > before
    for told in iterations(storage).values():
        assert told == list(range(1, len(told) + 1))
