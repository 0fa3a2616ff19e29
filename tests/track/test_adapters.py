"""Trackers of other projects, the real ones, offline: what they hold of a run that was killed and resumed."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.track.runs import STEPS, attempt, killed, training

from keepstep import Accelerator
from keepstep.errors import UsageError
from keepstep.track.adapters.csv import CSVTracker
from keepstep.track.adapters.jsonl import JSONLTracker
from keepstep.track.position import Position

INTERRUPTED = [{"saves": {2}, "dies_at": 5}, {"saves": {4}, "dies_at": 7}]


def interrupted(project: Path, **options: Any) -> None:
    """Killed twice, each time a while after its last checkpoint, and run to the end."""
    for how in INTERRUPTED:
        killed(project, **how, **options)
    attempt(project, **options)


# ------------------------------------------------------------------------------------------------ files


def csv_rows(project: Path) -> list[dict[str, str]]:
    with (project / "curve" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "_time"} for row in csv.DictReader(file)]


def jsonl_rows(project: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (project / "curve" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "_time"} for row in rows]


@pytest.mark.parametrize("init_first", [True, False])
def test_tables_of_a_killed_run_are_those_of_one_that_was_not(tmp_path: Path, init_first: bool) -> None:
    options: dict[str, Any] = {"log_with": ["csv", "jsonl"], "init_first": init_first}
    attempt(tmp_path / "whole", saves={2}, **options)
    interrupted(tmp_path / "killed", **options)
    assert csv_rows(tmp_path / "killed") == csv_rows(tmp_path / "whole")
    assert jsonl_rows(tmp_path / "killed") == jsonl_rows(tmp_path / "whole")
    rows = jsonl_rows(tmp_path / "killed")
    assert [row["_row"] for row in rows] == list(range(STEPS + 1))
    assert rows[-1] == {"_row": STEPS, "_step": STEPS, "eval/accuracy": 0.5, "eval/step": STEPS}
    table = csv_rows(tmp_path / "killed")
    assert table[0] == {**{k: str(v) for k, v in rows[0].items()}, "eval/accuracy": "", "eval/step": ""}
    config = json.loads((tmp_path / "killed" / "curve" / "config.json").read_text())
    assert config == {"lr": 0.1, "layers": [3, 1], "nested": {"name": "x"}, "none": None}
    assert sorted(p.name for p in (tmp_path / "killed" / "curve").iterdir()) == [
        *("config.json", "metrics.csv", "metrics.jsonl")
    ]


def test_a_torn_line_of_a_table_is_dropped_at_resume(tmp_path: Path) -> None:
    killed(tmp_path, saves={2}, dies_at=4, log_with=["csv", "jsonl"])
    for name in ("metrics.csv", "metrics.jsonl"):
        path = tmp_path / "curve" / name
        path.write_bytes(path.read_bytes()[:-5])
    attempt(tmp_path, log_with=["csv", "jsonl"])
    assert [row["_step"] for row in csv_rows(tmp_path)] == [str(s) for s in [*range(1, STEPS + 1), STEPS]]
    assert [row["_step"] for row in jsonl_rows(tmp_path)] == [*range(1, STEPS + 1), STEPS]


def test_text_of_every_kind_is_there_again_at_resume(tmp_path: Path) -> None:
    """Ends of lines that are none in JSON, text without bytes, and a line that a full disk has spoilt."""
    text = "a\u2028b\x85c\nd\udcff"
    trackers = [CSVTracker("t", tmp_path), JSONLTracker("t", tmp_path)]
    for tracker in trackers:
        tracker.begin("run", continued=True)
        tracker.start()
        for step in range(3):
            tracker.log({"text": text, "files": [{"of": 1}]}, step=step)
    with trackers[1].path.open("ab") as file:
        file.write(b'{"_row": 3, "te\n')
    for tracker, kept in zip(trackers, (text.replace("\udcff", "\\udcff"), text), strict=True):
        tracker.rewind(Position(rows=2, last_step=1))
        assert [(row["_row"], row["text"]) for row in tracker.read()] == [(0, kept), (1, kept)]


def test_the_table_of_another_run_is_set_aside(tmp_path: Path) -> None:
    for _ in range(3):
        attempt(tmp_path, log_with="csv", stop_after=2)
    assert len(csv_rows(tmp_path)) == 3
    names = sorted(path.name for path in (tmp_path / "curve").glob("*.csv"))
    assert names == ["metrics-1.csv", "metrics-2.csv", "metrics.csv"]


def test_a_table_takes_up_a_look_back_and_rewinds_when_training_goes_on(tmp_path: Path) -> None:
    attempt(tmp_path, saves={2}, log_with="jsonl")
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")
    model, optimizer, loader = training(accelerator)
    accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_0")
    accelerator.init_trackers("curve")
    accelerator.log({"test": 1.0}, step=2)
    assert len(jsonl_rows(tmp_path)) == STEPS + 2
    (x,) = next(iter(loader))
    accelerator.backward(model(x).mean())
    optimizer.step()
    accelerator.log({"loss": 0.0}, step=3)
    assert [(row["_row"], row["_step"]) for row in jsonl_rows(tmp_path)] == [(0, 1), (1, 2), (2, 2), (3, 3)]


# ------------------------------------------------------------------------------------------ TensorBoard


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("init_first", [True, False])
def test_tensorboard_shows_a_clean_curve(tmp_path: Path, init_first: bool) -> None:
    attempt(tmp_path / "whole", log_with="tensorboard")
    interrupted(tmp_path / "killed", log_with="tensorboard", init_first=init_first)
    shown = scalars(tmp_path / "killed" / "curve")
    assert shown == scalars(tmp_path / "whole" / "curve")
    assert [step for step, _ in shown["loss"]] == list(range(1, STEPS + 1))
    assert list(shown) == ["loss", "lr"]


def test_tensorboard_takes_text_dicts_images_and_options(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="tensorboard")
    accelerator.init_trackers(
        "p", {"lr": 0.1, "flags": [1, 2], "no": None}, {"tensorboard": {"flush_secs": 5}}
    )
    tracker = accelerator.get_tracker("tensorboard")
    accelerator.log({"note": "text", "both": {"a": 1.0, "b": torch.tensor(2.0)}, "thing": object()}, step=1)
    accelerator.log({"later": 1.0}, log_kwargs={"tensorboard": {"new_style": True}})
    tracker.log_images({"image": np.zeros((1, 3, 4, 4), dtype=np.uint8)}, step=1)
    accelerator.end_training()
    tags = EventAccumulator(str(tmp_path / "p")).Reload().Tags()
    assert "note/text_summary" in tags["tensors"]
    assert tags["images"] == ["image"]
    assert scalars(tmp_path / "p" / "both_b") == {"both": [(1, 2.0)]}


# ------------------------------------------------------------------------------------------------ wandb


@pytest.fixture
def _offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield
    wandb.teardown()  # it reads the environment once


def leveldb_records(data: bytes, block: int) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, as wandb's files are behind seven bytes."""
    at, whole = 7, b""
    data = bytes(7) + data  # blocks count from the file's beginning
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def wandb_runs(directory: Path) -> list[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """(id, rows) of each offline run, in order of time."""
    from wandb.proto import wandb_internal_pb2 as proto

    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        ident, rows = "", []
        for data in leveldb_records(path.read_bytes()[7:], block=(1 << 15)):
            record = proto.Record()
            record.ParseFromString(data)
            ident = record.run.run_id or ident
            if record.HasField("history"):
                items = {
                    ".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item
                }
                rows.append((items.pop("_step"), {k: v for k, v in items.items() if k[0] != "_"}))
        found.append((ident, rows))
    return found


@pytest.mark.usefixtures("_offline_wandb")
def test_wandb_goes_on_in_the_same_run(tmp_path: Path) -> None:
    killed(tmp_path, saves={2}, dies_at=3, log_with="wandb")
    __import__("wandb").finish()  # a process of its own would have ended there
    accelerator = attempt(tmp_path, log_with="wandb", init_first=True)
    first, second = wandb_runs(tmp_path)
    assert first[0] == second[0] == accelerator._saver.run
    assert [step for step, _ in first[1]] == [1, 2, 3]
    assert [step for step, _ in second[1]] == list(range(3, STEPS + 1))
    assert first[1][2] == second[1][0]


@pytest.mark.usefixtures("_offline_wandb")
def test_wandb_takes_no_row_twice_and_its_own_kinds_of_values(tmp_path: Path) -> None:
    import wandb

    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="wandb")
    training(accelerator)
    accelerator.init_trackers(
        "p", {"a": {"b": 1}}, {"wandb": {"tags": ["x"], "name": "named"}, "mlflow": {"no": 1}}
    )
    run = accelerator.get_tracker("wandb", unwrap=True)
    assert (run.name, run.tags, run.config["a"]) == ("named", ("x",), {"b": 1})
    accelerator.save_state()
    for step in range(4):
        accelerator.log({"x": step, "plot": wandb.Histogram([1.0, 2.0])}, step=step)
    accelerator.resume()
    for step in range(6):
        accelerator.log({"x": step}, step=step)
    tracker = accelerator.get_tracker("wandb")
    tracker.log_images({"image": [np.zeros((4, 4, 3), dtype=np.uint8)]}, step=7)
    tracker.log_table("table", columns=["a"], data=[[1]], step=8)
    accelerator.end_training()
    ((_, rows),) = wandb_runs(tmp_path)
    assert [(step, values["x"]) for step, values in rows if "x" in values] == [(s, s) for s in range(6)]
    assert {name for _, values in rows for name in values} >= {"x", "plot.bins", "table.ncols"}


# ----------------------------------------------------------------------------------------------- MLflow


@pytest.fixture
def _local_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # making a database takes seconds
    mlflow.set_tracking_uri(str(tmp_path / "mlflow"))
    yield
    while mlflow.active_run() is not None:
        mlflow.end_run()


@pytest.mark.usefixtures("_local_mlflow")
def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import mlflow

    project = tmp_path / "project"
    options: dict[str, Any] = {"log_with": "mlflow", "init_kwargs": {"mlflow": {"tags": {"team": "a"}}}}
    killed(project, saves={2}, dies_at=5, **options)
    mlflow.end_run()  # a process of its own would have ended there
    accelerator = attempt(project, **options, on_start=change_config)
    (experiment,) = [e for e in mlflow.search_experiments() if e.name == "curve"]
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["keepstep.run"] == accelerator._saver.run
    assert (run.data.tags["team"], run.info.status) == ("a", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [entry.step for entry in history] == list(range(1, STEPS + 1))
    assert run.data.metrics["eval/accuracy"] == 0.5
    assert run.data.params == {
        "lr": "0.1",
        "layers": "[3, 1]",
        "nested.name": "x",
        "none": "None",
        "more": "1",
    }
    assert "MLflow keeps lr=0.1, and does not take 0.2" in caplog.text


def change_config(accelerator: Accelerator) -> None:
    """What a script does that changes its mind at a resume."""
    tracker = accelerator.get_tracker("mlflow")
    tracker.store_init_configuration({"lr": 0.2, "more": 1, "long": "x" * 10_000})
    tracker.log({"nan": math.nan, "text": "x", "thing": object(), "listed": [object()]}, step=1)


# ------------------------------------------------------------------------------------------------ Comet


def test_comet_writes_one_experiment_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("comet_ml", reason="comet-ml is not among the packages that tests install")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path / "offline"))
    options: dict[str, Any] = {"log_with": "comet_ml", "init_kwargs": {"comet_ml": {"online": False}}}
    killed(tmp_path / "project", saves={2}, dies_at=5, **options)
    __import__("comet_ml").end()
    accelerator = attempt(tmp_path / "project", **options)
    key = f"keepstep{accelerator._saver.run * 2}"
    names = [path.name for path in (tmp_path / "offline").glob("*.zip")]
    assert len(names) == 2
    assert all(name.startswith(key) for name in names)


# ------------------------------------------------------------------------------------------------ all


@pytest.mark.parametrize("name", ["csv", "jsonl", "tensorboard", "wandb", "mlflow"])
@pytest.mark.usefixtures("_offline_wandb", "_local_mlflow")
def test_a_configuration_that_no_tracker_takes_is_told_by_name(tmp_path: Path, name: str) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with=name)
    with pytest.raises(
        UsageError, match=rf"{name} can't take .*: model/kind \(torch.dtype\), set \(builtins.set\)"
    ):
        accelerator.init_trackers("p", {"model": {"kind": torch.float32, "dir": Path("x")}, "set": {1}})
    accelerator.end_training()
