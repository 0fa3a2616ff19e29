"""Where a trial's code runs: what it writes by relative names is its own, and stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.tune.running import tuner

from keepstep import tune


def writes(config: dict[str, Any]) -> None:
    """Writes where it runs, as scripts do that know nothing of our names; fails once on its way."""
    Path("journal.jsonl").write_text("mine")
    start = 0
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as directory:
            start = int(Path(directory, config["given"]["steps_in"], "step").read_text())
    for step in range(start + 1, 4):
        if step == 3 and start == 0:
            raise RuntimeError("no luck")
        Path("checkpoint_000000").mkdir(exist_ok=True)
        Path("checkpoint_000000", "step").write_text(str(step))
        checkpoint = tune.Checkpoint.from_directory(config["given"]["reports"])
        tune.report({"step": step, "start": start}, checkpoint=checkpoint)


def silent(config: dict[str, Any]) -> None:
    tune.report({"cwd": str(Path.cwd()), "dir": tune.get_context().get_trial_dir()})


def fit(tmp_path: Path, trainable: Any, executor: str, space: dict[str, Any] | None = None) -> Any:
    once = tune.FailureConfig(max_failures=1)
    return tuner(tmp_path, trainable, space, executor=executor, failure_config=once).fit()


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_relative_names_are_the_trials_own_whatever_they_are(tmp_path: Path, executor: str) -> None:
    here = str(Path.cwd())
    given = [
        {"reports": ".", "steps_in": "checkpoint_000000"},
        {"reports": "checkpoint_000000", "steps_in": ""},
    ]
    found = fit(tmp_path, writes, executor, {"given": tune.grid_search(given)})
    for result, where in zip(found, ("files/checkpoint_000000", "files"), strict=True):
        assert (result.metrics["step"], result.metrics["start"]) == (3, 2)
        kept = sorted(Path(result.path).glob(f"checkpoint_*/{where}/step"))
        assert [path.read_text() for path in kept] == ["1", "2", "3"]
        assert Path(result.path, "working_dir", "journal.jsonl").read_text() == "mine"
        assert Path(result.path, "working_dir", "checkpoint_000000", "step").read_text() == "3"
    assert str(Path.cwd()) == here


@pytest.mark.parametrize("executor", ["inline", "local"])
def test_a_working_directory_that_nothing_was_written_to_does_not_stay(tmp_path: Path, executor: str) -> None:
    (result,) = fit(tmp_path, silent, executor)
    assert result.metrics["cwd"] == result.metrics["dir"] == str(Path(result.path, "working_dir"))
    assert not Path(result.path, "working_dir").exists()


def test_trials_stay_where_the_driver_is_if_they_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_CHDIR_TO_TRIAL_DIR", "0")
    (result,) = fit(tmp_path, silent, "inline")
    assert result.metrics["cwd"] == str(Path.cwd())
    assert result.metrics["dir"] == str(Path(result.path, "working_dir"))
