"""What users and machines do to an experiment that nobody would do on purpose."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.tune.running import tuner
from tests.tune.walk import Walk, population

from keepstep import tune
from keepstep.errors import StoreError
from keepstep.tune.experiment import Trial
from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import TrialLaunched
from keepstep.tune.schedulers import FIFOScheduler

HALF = "\udcff"
"""What Python makes of a byte that is no UTF-8, as in a file's name."""


def test_text_that_has_no_bytes_is_kept_and_told(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"name": config["name"]})
        raise ValueError(f"no file {HALF}")

    (result,) = tuner(tmp_path, train, {"name": HALF}).fit()
    assert result.metrics["name"] == HALF
    assert HALF in str(result.error)
    assert "\\udcff" in Path(result.path, "error.txt").read_text()
    (again,) = tune.Tuner.restore(str(tmp_path / "it"), train).get_results()
    assert again.config == {"name": HALF} == json.loads(Path(result.path, "params.json").read_text())


@pytest.mark.parametrize("moved", [True, False])
def test_an_experiment_that_is_moved_or_deleted_while_it_runs_ends_and_says_so(
    tmp_path: Path, moved: bool
) -> None:
    home = tmp_path / "it"

    def train(config: dict[str, Any]) -> None:
        for step in range(1, 5):
            if step == 3:
                home.rename(tmp_path / "elsewhere") if moved else shutil.rmtree(home)
            tune.report({"step": step})

    with pytest.raises(StoreError, match=r"journal\.jsonl was moved, replaced or deleted"):
        tuner(tmp_path, train).fit()
    if moved:
        found = tune.Tuner.restore(str(tmp_path / "elsewhere"), train).get_results()
        assert found[0].metrics["step"] >= 2


class Watching(FIFOScheduler):
    """Writes down how all trials stand whenever one reports."""

    seen: ClassVar[list[list[str]]] = []

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        self.seen.append([other.status for other in tune_controller.get_trials()])
        return super().on_trial_result(tune_controller, trial, result)


def test_schedulers_are_told_again_how_trials_stood_that_were_only_launched(tmp_path: Path) -> None:
    """A trial counts as running from its launch on, though its process takes a while to begin."""

    def train(config: dict[str, Any]) -> None:
        for _ in range(150 if config["number"] == 0 else 1):
            tune.report({"number": config["number"]})

    space = {"number": tune.grid_search(list(range(8)))}
    said = tune.TuneConfig(scheduler=Watching(), max_concurrent_trials=2)
    run = tuner(tmp_path, tune.with_resources(train, {"cpu": 0.5}), space, said=said, executor="local")
    Watching.seen.clear()
    run.fit()
    first, Watching.seen[:] = list(Watching.seen), []
    run.fit()  # everything had ended: it is told again, and nothing runs
    assert Watching.seen == first
    launched = [record.trial for record in read_journal(tmp_path / "it") if isinstance(record, TrialLaunched)]
    assert len(launched) == 8


def test_what_was_kept_for_an_exploit_goes_once_it_is_not_needed(tmp_path: Path) -> None:
    found = tuner(
        tmp_path,
        Walk,
        {"rate": tune.uniform(0, 1)},
        said=tune.TuneConfig(metric="x", mode="max", num_samples=4, scheduler=population(), seed=2),
        stop={"training_iteration": 12},
        checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
    ).fit()
    exploits = sum(bool(getattr(record, "acts", ())) for record in read_journal(tmp_path / "it"))
    assert exploits > 2
    assert [len(list(Path(result.path).glob("checkpoint_*"))) for result in found] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("handed_over", "message"),
    [
        (lambda: str(Path.cwd()), r"from_directory"),
        (lambda: Path("model.pt"), r"which is no checkpoint"),
        (lambda: tune.Checkpoint(Path.cwd().parent), "a directory of their own"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, handed_over: Any, message: str) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"x": 1}, checkpoint=handed_over())

    (result,) = tuner(tmp_path, train).fit()
    with pytest.raises(Exception, match=message):
        raise result.error or AssertionError
    assert not list(Path(result.path).glob("checkpoint_*"))


def test_callbacks_are_told_of_every_checkpoint_that_is_saved(tmp_path: Path) -> None:
    class Told(tune.Callback):
        def __init__(self) -> None:
            self.saves: list[str] = []
            self.made: list[tune.Checkpoint] = []

        def on_trial_save(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
            assert trial.status == Trial.RUNNING
            assert trial.checkpoint == self.made[-1]
            self.saves.append(trial.checkpoints[-1].name)

        def on_checkpoint(self, checkpoint: tune.Checkpoint, **info: Any) -> None:  # type: ignore[override]
            self.made.append(checkpoint)

    def train(config: dict[str, Any]) -> None:
        for step in range(2):
            tune.report({"step": step}, checkpoint=tune.Checkpoint.from_directory(os.environ["FULL"]))

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    told = Told()
    tuner(tmp_path, train, callbacks=[told], env={"FULL": str(tmp_path / "full")}).fit()
    assert told.saves == ["checkpoint_000000", "checkpoint_000001"]
    with told.made[0].as_directory() as directory:
        assert [entry.name for entry in Path(directory).iterdir()] == ["file"]


def test_a_metric_that_counts_and_never_comes_is_said_once_and_names_the_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: dict[str, Any]) -> None:
        tune.report({"loss": 0.5} if config["number"] == 0 else {"los": 0.5})

    space = {"number": tune.grid_search([0, 1, 2])}
    found = tuner(tmp_path, train, space, said=tune.TuneConfig(metric="loss", mode="min")).fit()
    (said,) = [record.getMessage() for record in caplog.records if "TuneConfig.metric" in record.getMessage()]
    assert "00001" in said
    assert "which has: los" in said
    assert found.get_best_result().config == {"number": 0}


def test_the_best_over_all_results_is_found(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        for loss in (config["lowest"], 9.0):
            tune.report({"loss": loss})

    found = tuner(tmp_path, train, {"lowest": tune.grid_search([3.0, 1.0, 2.0])}).fit()
    assert found.get_best_result("loss", "min", scope="all").config == {"lowest": 1.0}
