"""The checkpoint that a trial ends with: it is there, or the trial did not end well."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.tune.running import tuner
from tests.tune.walk import Walk, population

from keepstep import tune
from keepstep.tune.experiment import Trial
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import ResultReported, TrialFailed
from keepstep.tune.schedulers import ASHAScheduler


class Counter(tune.Trainable):
    """Counts to 5; saves at 2, and at its end, which fails as often as `config["fails"]` says."""

    def setup(self, config: dict[str, Any]) -> None:
        self.count = 0
        self.started_at = 0

    def step(self) -> dict[str, Any]:
        self.count += 1
        time.sleep(self.config.get("sleep", 0.0))
        return {
            "count": self.count,
            "began": self.started_at,
            "should_checkpoint": self.count == 2,
            "done": self.count == 5 and self.config["by"] == "itself",
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "count").write_text(str(self.count))
        before = len(list(Path.cwd().glob("failed_*")))
        if self.count == 5 and before < self.config["fails"]:
            Path(f"failed_{before}").touch()
            if self.config.get("kill"):
                os.kill(int(self.config["kill"]), signal.SIGKILL)
                time.sleep(60)
            if self.config.get("dies"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is full")

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.count = self.started_at = int(Path(checkpoint, "count").read_text())


class Seen(tune.Callback):
    """What was told of trials, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.told.append(f"saved {trial.checkpoints[-1].iteration}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.told.append("completed")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.told.append("failed")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.told.append("again")


def counter(
    tmp_path: Path,
    config: dict[str, Any],
    max_failures: int,
    seen: Seen | None = None,
    executor: str = "inline",
) -> tune.Tuner:
    by_scheduler = config["by"] == "scheduler"
    scheduler = ASHAScheduler(max_t=5, grace_period=5, metric="count", mode="max")
    return tuner(
        tmp_path,
        Counter,
        config,
        tune.TuneConfig(scheduler=scheduler if by_scheduler else None),
        executor=executor,
        stop={"training_iteration": 5} if config["by"] == "stopper" else None,
        failure_config=tune.FailureConfig(max_failures=max_failures),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        callbacks=[seen] if seen is not None else [],
    )


def kept(result: tune.Result) -> list[str]:
    return [path.read_text() for path in sorted(Path(result.path).glob("checkpoint_*/files/count"))]


def test_a_save_that_fails_at_the_end_is_the_trials_error(tmp_path: Path) -> None:
    seen = Seen()
    found = counter(tmp_path, {"by": "itself", "fails": 1}, 0, seen).fit()
    assert (found.num_errors, found.num_terminated) == (1, 0)
    assert "the disk is full" in str(found[0].error)
    assert kept(found[0]) == ["2"]
    assert seen.told == ["saved 2", "failed"]
    on = tune.Tuner.restore(tmp_path / "it", Counter, resume_errored=True).fit()
    assert (on.num_errors, on[0].error, kept(on[0])) == (0, None, ["5"])
    results = [record for record in read_journal(tmp_path / "it") if isinstance(record, ResultReported)]
    assert [record.iteration for record in results] == [1, 2, 3, 4, 5]  # nothing was told twice
    again = tune.Tuner.restore(tmp_path / "it", Counter).fit()
    assert (again.num_terminated, kept(again[0])) == (1, ["5"])


@pytest.mark.parametrize("by", ["itself", "stopper", "scheduler"])
def test_it_is_tried_again_as_often_as_failures_are_allowed_and_ends_where_it_ended(
    tmp_path: Path, by: str
) -> None:
    seen = Seen()
    found = counter(tmp_path, {"by": by, "fails": 2}, 2, seen).fit()
    assert (found.num_terminated, found[0].error, kept(found[0])) == (1, None, ["5"])
    assert found[0].metrics["training_iteration"] == 5
    assert seen.told == ["saved 2", "again", "again", "saved 5", "completed"]
    trial = found.history.all[0]
    assert (trial.num_failures, trial.ended_by, trial.ends_at) == (2, by, None)
    records = read_journal(tmp_path / "it")
    told = History.of(records, str(tmp_path / "it")).all[0]
    assert (told.status, told.ended_by, told.ends_at) == (trial.status, trial.ended_by, trial.ends_at)
    before = len(records)
    assert counter(tmp_path, {"by": by, "fails": 2}, 2).fit().num_terminated == 1
    assert len(read_journal(tmp_path / "it")) == before + 2  # a driver started, and had nothing to do


def test_a_process_killed_while_it_saves_at_its_end_has_failed(tmp_path: Path) -> None:
    config = {"by": "stopper", "fails": tune.grid_search([0, 1, 2]), "dies": True}
    found = counter(tmp_path, config, 1, executor="local").fit()
    assert [kept(result) for result in found] == [["5"], ["5"], ["2"]]
    assert [result.ended_by for result in found] == ["stopper", "stopper", "error"]
    assert "killed by SIGKILL" in str(found[2].error)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.tune.test_last_checkpoint import counter
import os
kill = int(sys.argv[3]) and os.getpid()
counter(Path(sys.argv[1]), {{"by": sys.argv[2], "fails": 1, "kill": kill}}, 0).fit()
"""


@pytest.mark.parametrize("by", ["itself", "scheduler"])
def test_a_driver_killed_while_a_trial_saves_at_its_end_has_it_save_when_it_is_back(
    tmp_path: Path, by: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[2])))
    first = subprocess.run([sys.executable, str(script), str(tmp_path), by, "1"], check=False)
    assert first.returncode == -signal.SIGKILL
    (result,) = tune.Tuner.restore(tmp_path / "it", Counter).get_results()
    assert (result.metrics["training_iteration"], kept(result)) == (5, ["2"])
    (result,) = tune.Tuner.restore(tmp_path / "it", Counter).fit()
    assert (kept(result), result.error) == (["5"], None)
    lines = Path(result.path, "result.json").read_text().splitlines()
    assert [json.loads(line)["training_iteration"] for line in lines] == [1, 2, 3, 4, 5]


class UnsureWalk(Walk):
    """Saves fail once each at iterations 4, where trials are paused, and 12, where they end."""

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        super().save_checkpoint(checkpoint_dir)
        mark = Path(f"failed_{self.iteration}")
        if self.iteration in (4, 12) and not mark.exists():
            mark.touch()
            raise OSError("the disk is full")


@pytest.mark.parametrize("synch", [False, True])
def test_saves_of_a_population_that_fail_are_tried_again_and_a_restart_agrees(
    tmp_path: Path, synch: bool
) -> None:
    def run() -> tune.ResultGrid:
        return tuner(
            tmp_path,
            UnsureWalk,
            {"rate": tune.uniform(0, 1)},
            tune.TuneConfig(
                metric="x",
                mode="max",
                num_samples=4,
                scheduler=population(synch=synch),
                seed=2,
                max_concurrent_trials=2,
            ),
            stop={"training_iteration": 12},
            failure_config=tune.FailureConfig(max_failures=2),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
        ).fit()

    found = run()
    assert [str(error) for error in found.errors] == []
    records = read_journal(tmp_path / "it")
    assert sum(any(act.do == "exploit" for act in getattr(record, "acts", ())) for record in records) > 2
    assert sum(isinstance(record, TrialFailed) for record in records) >= 4
    for trial in found.history.all:
        assert (trial.status, trial.ended_by, trial.iteration) == ("TERMINATED", "stopper", 12)
        assert [made.iteration for made in trial.checkpoints] == [12]
    run()  # everybody is told again, and must decide as before
    assert len(read_journal(tmp_path / "it")) == len(records) + 2
