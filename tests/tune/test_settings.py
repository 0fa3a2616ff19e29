"""What can't be is refused where it is said, with what was meant."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keepstep import tune
from keepstep.errors import UsageError
from keepstep.tune.schedulers import ASHAScheduler


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tune.RunConfig(name=3), r"name is 3 \(int\); expected a string"),
        (lambda: tune.RunConfig(storage_path=3), "storage_path is 3"),
        (lambda: tune.RunConfig(verbose="loud"), "verbose is 'loud'"),
        (lambda: tune.RunConfig(callbacks=tune.Callback()), "expected a list"),
        (lambda: tune.RunConfig(callbacks=[tune.Callback]), r"class Callback; make one of it: Callback\("),
        (lambda: tune.RunConfig(callbacks=["csv"]), "'csv'.*expected a tune.Callback"),
        (lambda: tune.RunConfig(progress_reporter=3), "expected a tune.ProgressReporter"),
        (lambda: tune.RunConfig(checkpoint_config={"num_to_keep": 1}), "expected a tune.CheckpointConfig"),
        (lambda: tune.RunConfig(failure_config=3), "expected a tune.FailureConfig"),
        (lambda: tune.TuneConfig(metric=3), "metric is 3"),
        (lambda: tune.TuneConfig(scheduler=3), "scheduler is 3"),
        (lambda: tune.TuneConfig(scheduler=ASHAScheduler), "make one of it: AsyncHyperBandScheduler"),
        (lambda: tune.TuneConfig(search_alg=3), "search_alg is 3"),
        (lambda: tune.TuneConfig(time_budget_s="1h"), "seconds, or a timedelta"),
        (lambda: tune.TuneConfig(time_budget_s=dt.timedelta(0)), "more than 0"),
        (lambda: tune.TuneConfig(time_budget_s=float("nan")), "more than 0"),
    ],
)
def test_what_is_of_another_kind_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_none_is_the_default_as_in_ray_tune() -> None:
    config = tune.RunConfig(checkpoint_config=None, failure_config=None, verbose=None)  # type: ignore[arg-type]
    assert config.verbose == 1
    assert tune.TuneConfig("min", "loss") == tune.TuneConfig(metric="loss", mode="min")
    assert config.checkpoint_config == tune.CheckpointConfig()
    assert config.failure_config == tune.FailureConfig()


def test_an_experiment_that_has_ended_says_that_nothing_was_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    totals: list[Any] = []

    class Told(tune.Callback):
        def setup(self, total_num_samples: int | None = None, **info: Any) -> None:  # type: ignore[override]
            totals.append(total_num_samples)

    def run() -> str:
        tune.Tuner(
            lambda config: {"x": config["x"]},
            param_space={"x": tune.grid_search([1, 2])},
            tune_config=tune.TuneConfig(num_samples=2),
            run_config=tune.RunConfig(
                name="it", storage_path=tmp_path, executor="inline", callbacks=[Told()], log_to_file=True
            ),
        ).fit()
        return capsys.readouterr().out

    assert "nothing was left to run" not in run()
    assert "nothing was left to run: all trials had ended" in run()
    assert totals == [4, 4]
