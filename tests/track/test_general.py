"""Trackers of one's own, names of trackers, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.track.runs import attempt, killed

from keepstep import Accelerator
from keepstep.errors import MissingPackageError, UsageError
from keepstep.track import registry
from keepstep.track.general import BlankTracker
from keepstep.track.position import Position
from keepstep.tracking import (
    GeneralTracker,
    LoggerType,
    get_available_trackers,
    on_main_process,
    register_tracker_class,
)


class Mine(GeneralTracker):
    """As a script for Accelerate would write it."""

    name = "mine"
    requires_logging_directory = False

    @on_main_process
    def __init__(self, run_name: str = "", **kwargs: Any) -> None:
        super().__init__()
        self.calls: list[Any] = [("made", run_name, kwargs)]

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(("config", values))

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append(("log", values, step, kwargs))

    def finish(self) -> None:
        self.calls.append("finish")


class Following(Mine):
    """One that goes on in the same run."""

    name = "following"

    def begin(self, run: str, *, continued: bool) -> None:
        self.calls.append(("begin", len(run), continued))

    def rewind(self, position: Position) -> None:
        self.calls.append(("rewind", position.rows, position.next_step))

    def start(self) -> None:
        self.calls.append("start")


def test_a_tracker_of_ones_own_gets_what_the_script_logs(tmp_path: Path) -> None:
    mine = Mine("x")
    accelerator = Accelerator(cpu=True, log_with=mine)
    accelerator.init_trackers("p", {"kept": object}, {"wandb": {"ignored": True}})
    accelerator.log({"a": 1}, step=3)
    accelerator.log({"b": 2}, log_kwargs={"mine": {"color": "red"}, "tensorboard": {}})
    assert accelerator.get_tracker("mine") is mine
    assert accelerator.get_tracker("mine", unwrap=True) is mine.calls
    assert (accelerator.trackers, accelerator.log_with) == ([mine], ("mine",))
    accelerator.end_training()
    accelerator.end_training()
    assert mine.calls == [
        ("made", "x", {}),
        ("config", {"kept": object}),
        ("log", {"a": 1}, 3, {}),
        ("log", {"b": 2}, 4, {"color": "red"}),
        "finish",
    ]


@pytest.mark.parametrize("init_first", [True, False])
def test_a_tracker_that_follows_a_run_is_told_of_the_resume_once(tmp_path: Path, init_first: bool) -> None:
    killed(tmp_path, saves={2}, dies_at=5, log_with=Following(), init_first=init_first)
    second = Following()
    attempt(tmp_path, log_with=second, init_first=init_first)
    kinds = [call if isinstance(call, str) else call[0] for call in second.calls]
    assert kinds == ["made", "begin", "start", "rewind", "config", *["log"] * 7, "finish"]
    assert second.calls[1:4] == [("begin", 16, True), "start", ("rewind", 2, 3)]
    assert second.calls[5][2] == 3


def test_trackers_that_began_too_early_change_over_and_say_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(tmp_path, saves={2}, dies_at=5)
    tracker = Following()
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with=tracker)
    accelerator.prepare(*_parts())
    accelerator.init_trackers("p")
    accelerator.log({"too": "early"})
    accelerator.resume()
    kinds = [call if isinstance(call, str) else call[0] for call in tracker.calls]
    assert kinds == ["made", "begin", "start", "log", "finish", "begin", "start", "rewind"]
    assert "Call log() and get_tracker() after resume()" in caplog.text


def _parts() -> tuple[Any, ...]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    model = torch.nn.Linear(3, 1)
    data = TensorDataset(torch.randn(16, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=2, shuffle=True)


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        ({}, "`name`, `requires_logging_directory`, `tracker`"),
        ({"name": "x", "tracker": None}, "`requires_logging_directory`"),
        ({"name": "x", "requires_logging_directory": False}, "`tracker`"),
    ],
)
def test_a_tracker_that_lacks_something_says_what(body: dict[str, Any], missing: str) -> None:
    with pytest.raises(UsageError, match=f"Bad lacks {missing}, which"):
        type("Bad", (GeneralTracker,), body)()


def test_a_blank_tracker_takes_anything() -> None:
    blank = BlankTracker()
    blank.log({"a": 1}, step=1)
    blank.tracker.config.update({"a": 1})
    blank.tracker.config["x"] = blank["y"].z(3)
    blank.anything = 3
    assert not blank
    assert blank.tracker.log_images({}) is blank


def test_a_registered_class_is_made_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})

    class Placed(Mine):
        name = "placed"
        requires_logging_directory = True

        def __init__(self, run_name: str, logging_dir: Any, **kwargs: Any) -> None:
            super().__init__(f"{run_name} in {logging_dir}", **kwargs)

    register_tracker_class(Placed)
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="placed")
    accelerator.init_trackers("p", init_kwargs={"placed": {"more": 1}})
    assert accelerator.get_tracker("placed").calls == [("made", f"p in {tmp_path}", {"more": 1})]
    with pytest.raises(UsageError, match=r"log_with='placed' needs a directory to write to"):
        Accelerator(cpu=True, log_with="placed")
    for wrong in (3, type("Nameless", (GeneralTracker,), {"requires_logging_directory": True})):
        with pytest.raises(UsageError, match=r"register_tracker_class|must have a `name`"):
            register_tracker_class(wrong)  # type: ignore[arg-type]


def test_all_is_every_tracker_that_is_installed(tmp_path: Path) -> None:
    assert get_available_trackers() == ["tensorboard", "wandb", "mlflow"]
    mine = Mine()
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with=[LoggerType.ALL, mine, "csv", "wandb"])
    assert accelerator.log_with == ("tensorboard", "wandb", "mlflow", "mine", "csv")
    assert Accelerator(cpu=True, project_dir=tmp_path, log_with=LoggerType.CSV).log_with == ("csv",)


@pytest.mark.parametrize(
    ("log_with", "words"),
    [
        ("tensorbord", "log_with='tensorbord' names no tracker; there are: tensorboard, wandb"),
        ("aim", "keepstep has no tracker for aim. Derive one from keepstep.tracking.GeneralTracker"),
        (LoggerType.CLEARML, "keepstep has no tracker for clearml"),
        ("comet_ml", r"needs comet_ml, which is not installed: pip install 'keepstep\[comet\]'"),
        (3, r"log_with holds 3 \(int\); allowed are names"),
        ([None, Mine], "log_with holds <class"),
        ("tensorboard", "needs a directory to write to"),
    ],
)
def test_what_log_with_cannot_be_is_told(log_with: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Accelerator(cpu=True, log_with=log_with)


def test_a_directory_of_the_package_s_name_is_no_package(tmp_path: Path) -> None:
    """wandb writes to ./wandb, which Python would take for a package."""
    (tmp_path / "comet_ml").mkdir()
    code = "from keepstep.track.registry import get_available_trackers as a; print('comet_ml' in a())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_calls_in_the_wrong_order_are_told(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="csv")
    with pytest.raises(UsageError, match=r"log\(\) was called before init_trackers\(\)"):
        accelerator.log({"a": 1})
    with pytest.raises(UsageError, match=r"call init_trackers\(\) first"):
        accelerator.get_tracker("csv")
    assert accelerator.trackers == []
    accelerator.init_trackers("p")
    with pytest.raises(UsageError, match="was called twice"):
        accelerator.init_trackers("p")
    with pytest.raises(UsageError, match=r"no such tracker; it has: csv. Name it in log_with"):
        accelerator.get_tracker("jsonl")
    with pytest.raises(UsageError, match=r"log\(log_kwargs=...\) is for 'cvs', and there is no such tracker"):
        accelerator.log({"a": 1}, log_kwargs={"cvs": {}})
    accelerator.end_training()
    with pytest.raises(UsageError, match=r"or after end_training\(\)"):
        accelerator.log({"a": 1})


def test_options_that_a_tracker_does_not_take_are_told(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="csv")
    with pytest.raises(UsageError, match="is for 'csvv', and there is no such tracker"):
        accelerator.init_trackers("p", init_kwargs={"csvv": {}})
    with pytest.raises(UsageError, match=r"options that CSVTracker doesn't take: .*'separator'"):
        accelerator.init_trackers("p", init_kwargs={"csv": {"separator": ";"}})
    with pytest.raises(UsageError, match=r"takes a mapping of names to values; it was given .*Namespace"):
        accelerator.init_trackers("p", __import__("argparse").Namespace(a=1))


def test_the_faces_for_imports_have_the_names() -> None:
    from keepstep import logging, tracking, utils

    for name in tracking.__all__:
        if name == "CometMLTracker":
            with pytest.raises(MissingPackageError, match="comet_ml"):
                getattr(tracking, name)
        else:
            assert getattr(tracking, name).__doc__
    assert sorted(logging.__all__) == ["MultiProcessAdapter", "get_logger"]
    assert utils.LoggerType is LoggerType
    assert utils.tqdm([1], disable=True).n == 0
    with pytest.raises(AttributeError, match=r"no attribute 'AimTracker'; it has: .*TensorBoardTracker"):
        tracking.AimTracker  # noqa: B018


def test_a_bucket_is_no_place_for_trackers() -> None:
    from keepstep import ProjectConfiguration

    with pytest.raises(UsageError, match="logging_dir must be a directory: trackers write to a disk"):
        ProjectConfiguration(logging_dir="s3://bucket/logs")
