"""An experiment of Population Based Training, killed ten times by SIGKILL, decides as one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import ResultReported, TrialEnded, TrialMade

SCRIPT = """
import json, os, signal, sys, tempfile, threading
from pathlib import Path
from keepstep import tune

storage, synch, kill_after, delay_s = sys.argv[1], *map(float, sys.argv[2:])
steps = 0

def train(config):
    global steps
    step, weight = 0, 0.0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            step, weight = json.loads(Path(directory, "state").read_text())
    while step < 13:
        step, weight = step + 1, weight + config["x"] * (12 - step)
        steps += 1
        if steps == kill_after:
            threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "state").write_text(json.dumps([step, weight]))
            tune.report({"weight": weight}, checkpoint=tune.Checkpoint.from_directory(directory))

results = tune.Tuner(
    train,
    tune_config=tune.TuneConfig(
        metric="weight", mode="max", num_samples=6, max_concurrent_trials=1, seed=5,
        scheduler=tune.schedulers.PopulationBasedTraining(
            "training_iteration", perturbation_interval=2, synch=bool(synch),
            hyperparam_mutations={"x": tune.uniform(0, 1), "deep": {"y": [1, 2, 3]}},
        ),
    ),
    run_config=tune.RunConfig(
        name="it", storage_path=storage, executor="inline", verbose=0,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    ),
).fit()
assert not results.errors, results.errors
"""


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A directory where waiting for the disk takes no time, where the machine has one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield Path(directory)


def run(script: Path, storage: Path, *arguments: float) -> int:
    command = [sys.executable, str(script), str(storage), *(str(float(argument)) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def decisions(storage: Path) -> list[Any]:
    """What was tried, reported and decided, in order; trials by their numbers."""
    found: list[Any] = []
    for record in read_journal(storage / "it"):
        if isinstance(record, TrialMade):
            found.append([record.trial[-5:], record.config])
        elif isinstance(record, ResultReported | TrialEnded):
            acts = [
                [act.do, act.trial[-5:], (act.source or "")[-5:], act.checkpoint, act.config]
                for act in record.acts
            ]
            told = (
                [record.iteration, record.metrics, record.checkpoint, record.decision]
                if isinstance(record, ResultReported)
                else []
            )
            found.append([record.trial[-5:], *told, acts])
    return found


@pytest.mark.parametrize("synch", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_killed_ten_times_it_decides_the_same(in_memory: Path, synch: bool) -> None:
    script, whole, killed = in_memory / "script.py", in_memory / "whole", in_memory / "killed"
    script.write_text(SCRIPT)
    assert run(script, whole, synch, 0, 0) == 0
    for kill in range(10):
        # Somewhere behind its fourth step: while it saves, reports, is written down, or is answered.
        assert run(script, killed, synch, 4, 0.002 * kill) == -signal.SIGKILL
    assert run(script, killed, synch, 0, 0) == 0
    assert decisions(killed) == decisions(whole)
    assert sum(act[0] == "exploit" for told in decisions(whole) for act in told[-1] if told[2:]) > 5
