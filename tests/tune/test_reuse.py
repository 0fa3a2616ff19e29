"""Processes that run trial after trial, and are killed: no trial is lost, and none has what was another's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import ResultReported, TrialFailed

SCRIPT = """
import json, sys, time
from pathlib import Path
from keepstep import tune

class Sum(tune.Trainable):
    def setup(self, config):
        self.total, self.steps, self.saves = 0, 0, 0

    def step(self):
        time.sleep(0.03)
        self.total += self.config["x"]
        self.steps += 1
        Path("steps").open("a").write(f"{self.steps}\\n")
        return {"total": self.total, "id": self.trial_id, "done": self.steps == 6}

    def reset_config(self, new_config):
        self.total, self.steps = 0, 0
        return True

    def save_checkpoint(self, checkpoint_dir):
        Path(checkpoint_dir, "state").write_text(json.dumps([self.total, self.steps]))

    def load_checkpoint(self, checkpoint_dir):
        self.total, self.steps = json.loads(Path(checkpoint_dir, "state").read_text())

if __name__ == "__main__":
    tune.Tuner(
        Sum,
        param_space={"x": tune.grid_search(list(range(1, 13)))},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=2),
        run_config=tune.RunConfig(
            name="it", storage_path=sys.argv[1], verbose=0,
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=2, num_to_keep=1),
        ),
    ).fit()
    print("done")
"""


def start(tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "script.py").write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def results(tmp_path: Path) -> list[ResultReported]:
    with contextlib.suppress(FileNotFoundError):
        return [record for record in read_journal(tmp_path / "it") if isinstance(record, ResultReported)]
    return []


def reach(tmp_path: Path, process: subprocess.Popen[str], least: int) -> list[ResultReported]:
    end = time.monotonic() + 60
    while len(found := results(tmp_path)) < least:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def kill_one(tmp_path: Path) -> bool:
    """Kill a process that trains now; whether there was one."""
    history = History.of(read_journal(tmp_path / "it"), str(tmp_path / "it"))
    for trial in history.live.values():
        pid = trial.last_result.get("pid")
        if pid and trial.status == "RUNNING":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
    return False


def test_trials_of_one_process_survive_its_death_and_the_drivers(tmp_path: Path) -> None:
    process = start(tmp_path)
    for least in (16, 30):  # each of the two has run one trial at least, and is in a later one
        reach(tmp_path, process, least)
        while not kill_one(tmp_path):
            time.sleep(0.01)
    reach(tmp_path, process, 44)
    process.kill()
    process.communicate()
    assert start_again(tmp_path) == "done\n"
    told: dict[str, list[Any]] = {}
    records = read_journal(tmp_path / "it")
    for record in records:
        if isinstance(record, ResultReported):
            told.setdefault(record.trial, []).append(record)
    assert len(told) == 12
    history = History.of(records, str(tmp_path / "it"))
    pids = set()
    for trial in history.all:
        x, own = trial.config["x"], told[trial.trial_id]
        assert [(found.iteration, found.metrics["total"]) for found in own] == [
            (n, n * x) for n in range(1, 7)
        ]
        assert {found.metrics["id"] for found in own} == {trial.trial_id}
        assert (trial.status, trial.ended_by) == ("TERMINATED", "itself")
        state = json.loads(Path(trial.path, trial.checkpoints[-1].name, "files", "state").read_text())
        assert state == [6 * x, 6]
        assert set(Path(trial.path, "working_dir", "steps").read_text().split()) == set("123456")
        pids |= {json.loads(line)["pid"] for line in Path(trial.path, "result.json").read_text().splitlines()}
    failed = [record for record in records if isinstance(record, TrialFailed)]
    assert 1 <= len(failed) <= 2  # one may have come to the end of its trial before it was killed
    assert all("SIGKILL" in record.error for record in failed)
    assert len(pids) <= 8  # of 12 trials, 2 processes at a time, 2 killed, and 2 of the second driver


def start_again(tmp_path: Path) -> str:
    return start(tmp_path).communicate(timeout=120)[0]
