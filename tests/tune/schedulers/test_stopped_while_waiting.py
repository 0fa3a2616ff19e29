"""Trials that a scheduler ends while they don't report: all who have to know are told, once."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepstep import tune
from keepstep.tune.driver.deciding import Decider
from keepstep.tune.experiment.history import History
from keepstep.tune.experiment.journal import read_journal
from keepstep.tune.experiment.records import ExperimentMade, TrialMade
from keepstep.tune.experiment.trial import Trial
from keepstep.tune.schedulers import FIFOScheduler, HyperBandScheduler, TrialScheduler
from keepstep.tune.schedulers.base import Controller, Decision
from keepstep.tune.search import BasicVariantGenerator
from keepstep.tune.stopper import NoopStopper

Train = Callable[[dict[str, Any]], None]


class Ends(tune.Callback):
    """The numbers of trials that ended, in order."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        assert trial.is_finished()
        self.ended.append(trial.number)


class Ender(FIFOScheduler):
    """The others wait once they report; the last trial of three ends them: when it reports, or ends."""

    def __init__(self, when: str, others: Decision = "PAUSE") -> None:
        self.when = when
        self.others = others
        self.heard: list[str] = []

    def _end_all(self, controller: Controller) -> None:
        for _ in range(2):
            for other in controller.get_trials():
                if other.number < 2:
                    controller.stop_trial(other)

    def on_trial_result(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> Decision:
        self.heard.append(f"{trial.number} reported")
        if trial.number < 2:
            assert trial.status == "RUNNING"
            return self.others
        if self.when == "reports":
            self._end_all(tune_controller)
        return "CONTINUE"

    def on_trial_complete(self, tune_controller: Controller, trial: Trial, result: dict[str, Any]) -> None:
        if self.when == "ends":
            self._end_all(tune_controller)

    def on_trial_error(self, tune_controller: Controller, trial: Trial) -> None:
        self._end_all(tune_controller)

    def on_trial_remove(self, tune_controller: Controller, trial: Trial) -> None:
        self.heard.append(f"{trial.number} removed")


def fit(
    path: Path, train: Any, scheduler: TrialScheduler, samples: int, at_once: int, **said: Any
) -> tuple[tune.ResultGrid, list[int]]:
    ends = Ends()
    found = tune.Tuner(
        tune.with_resources(train, {"cpu": 0.1}),
        param_space={"number": tune.grid_search(list(range(samples)))},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", scheduler=scheduler, max_concurrent_trials=at_once
        ),
        run_config=tune.RunConfig(
            name="it", storage_path=path, executor="inline", verbose=0, callbacks=[ends], **said
        ),
    ).fit()
    return found, ends.ended


def report_with_checkpoint(metrics: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "state").write_text("x")
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))


def steps(config: dict[str, Any]) -> None:
    for _ in range(3):
        if config["number"] < 2:
            report_with_checkpoint({"other": 1})
        else:
            tune.report({"loss": 1})


def failing(config: dict[str, Any]) -> None:
    steps(config)
    if config["number"] == 2:
        raise RuntimeError("no more")


def test_callbacks_hear_of_each_trial_that_hyperband_stops(tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        for _ in range(9):
            report_with_checkpoint({"loss": -config["number"]})  # so that those who wait are the worst

    found, ended = fit(tmp_path, train, HyperBandScheduler(max_t=9, reduction_factor=3), 12, 4)
    assert sum(result.metrics["training_iteration"] < 9 for result in found) > 1
    assert Counter(ended) == Counter(range(12))


@pytest.mark.parametrize(
    ("when", "train"), [("reports", steps), ("ends", steps), ("fails", failing)], ids=lambda it: str(it)[:9]
)
def test_who_waits_and_is_ended_by_another_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str, train: Train
) -> None:
    scheduler = Ender(when)
    with caplog.at_level(logging.WARNING):
        found, ended = fit(tmp_path, train, scheduler, 3, 1, byte_budget=1)
    assert sorted(ended) == ([0, 1] if when == "fails" else [0, 1, 2])
    assert [line for line in scheduler.heard if "removed" in line] == ["0 removed", "1 removed"]
    acts = [
        (act.do, act.trial) for record in read_journal(tmp_path / "it") for act in getattr(record, "acts", ())
    ]
    assert acts == [("stop", trial_id) for trial_id in sorted({trial_id for _, trial_id in acts})]
    assert caplog.text.count("ended without the metric 'loss'") == 1
    left = [path for result in found for path in Path(result.path).glob("checkpoint_*")]
    assert len(left) == 1  # a trial that may go on would keep its own


@pytest.mark.parametrize("train", [steps, failing])
def test_who_runs_is_ended_with_the_end_of_another(tmp_path: Path, train: Train) -> None:
    def endless(config: dict[str, Any]) -> None:
        if config["number"] == 2:
            train(config)
            return
        for _ in range(200):
            tune.report({"loss": 1})

    scheduler = Ender("ends", others="CONTINUE")
    found, ended = fit(tmp_path, endless, scheduler, 3, 3)
    reached = {result.config["number"]: result.metrics["training_iteration"] for result in found}
    assert max(reached.values()) < 10
    assert Counter(ended)[0] == Counter(ended)[1] == 1
    assert not any("removed" in line for line in scheduler.heard)


def test_a_trial_that_has_ended_can_not_be_ended_again() -> None:
    made = ExperimentMade(time=0.0, id="it", name="it", trainable="it", seed=0, spec={})
    history, scheduler = History(made, "/it"), Ender("reports")
    decider = Decider(
        history, searcher=BasicVariantGenerator(), scheduler=scheduler, stopper=NoopStopper(), param_space={}
    )
    history.apply(
        TrialMade(time=0.0, trial="a", config={}, evaluated={}, tag="", dirname="a", resources={"cpu": 1.0})
    )
    trial = history.trial("a")
    trial.ends_at = 3  # it lacks only its last checkpoint
    decider.steering.stop_trial(trial)
    assert (scheduler.heard, decider.steering.take()) == ([], ())
    trial.ends_at = None
    decider.steering.stop_trial(trial)
    decider.steering.stop_trial(trial)
    assert scheduler.heard == ["0 removed"]
    assert [act.do for act in decider.steering.take()] == ["stop"]


class Unsavable(tune.Trainable):
    """Trials that can't save."""

    def step(self) -> dict[str, Any]:
        return {"loss": 1, "done": self.config["number"] == 2 and self.iteration == 2}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        if self.config["number"] < 2:
            raise OSError("the disk is full")


def test_a_save_to_wait_with_does_not_matter_once_the_trial_is_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, ended = fit(tmp_path, Unsavable, Ender("reports"), 3, 3)
    assert (found.num_errors, Counter(ended)) == (0, Counter(range(3)))
    assert caplog.text.count("failed as it ended; what it had saved counts: ") == 2


class AllAtFirst(FIFOScheduler):
    """All trials are made before one starts."""

    whole_population = True


class Enough(tune.Stopper):
    """Ends the experiment with the fourth result."""

    def __init__(self) -> None:
        self.results = 0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        self.results += 1
        return False

    def stop_all(self) -> bool:
        return self.results >= 4


def test_trials_that_end_with_the_experiment_have_ended_for_everybody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: dict[str, Any]) -> None:
        for _ in range(50):
            report_with_checkpoint({"other": 1})

    found, ended = fit(tmp_path, train, AllAtFirst(), 3, 2, byte_budget=1, stop=Enough())
    assert found.num_terminated == 3
    assert Counter(ended) == Counter(range(2))  # the third never began
    assert caplog.text.count("ended without the metric 'loss'") == 1
    left = [path for result in found for path in Path(result.path).glob("checkpoint_*")]
    assert len(left) == 1  # trials that may go on would keep one each
