"""The run's own log: one clean curve, whatever died while it was written."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.forked import run_program, start_program
from tests.track.runs import STEPS, attempt, curve, killed, training, whole

from keepstep import Accelerator, Checkpoint
from keepstep.errors import UsageError
from keepstep.track import read_log
from keepstep.track.runlog import RunLog


def lines(project: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines() if line]


def test_a_run_leaves_every_row_with_where_it_came_from(tmp_path: Path) -> None:
    before = time.time()
    attempt(tmp_path, saves={2})
    log = read_log(tmp_path)
    assert [row.step for row in log] == [*range(1, STEPS + 1), STEPS]
    assert all(isinstance(row.values["loss"], float) for row in log.rows[:-1])
    assert log.rows[-1].values == {"eval": {"accuracy": 0.5, "step": STEPS}}
    assert {row.attempt for row in log} == {1}
    assert (
        {row.run for row in log}
        == {log.run}
        == {Checkpoint.open(tmp_path / "checkpoints/checkpoint_0").manifest.run}
    )
    assert all(before - 1 < row.time < time.time() + 1 for row in log)
    assert (log.project, log.config) == (
        "curve",
        {"lr": 0.1, "layers": [3, 1], "nested": {"name": "x"}, "none": None},
    )
    assert read_log(tmp_path / "log.jsonl") == log


@pytest.mark.parametrize("init_first", [True, False])
def test_a_killed_and_resumed_run_leaves_the_curve_of_one_that_was_not(
    tmp_path: Path, init_first: bool
) -> None:
    expected = whole(tmp_path / "whole")
    project = tmp_path / "killed"
    killed(project, saves={2}, dies_at=5, init_first=init_first)
    assert [row.step for row in read_log(project)] == [1, 2, 3, 4, 5]
    killed(project, saves={4}, dies_at=7, init_first=init_first)
    assert [row.step for row in read_log(project)] == [1, 2, 3, 4, 5, 6, 7]
    attempt(project, saves={6}, init_first=init_first)
    log = read_log(project)
    assert curve(log) == expected
    assert [row.attempt for row in log] == [1, 1, 2, 2, 3, 3, 3, 3, 3]
    assert len({row.run for row in log}) == 1
    assert len(lines(project)) > len(log) + 3  # nothing that was ever logged is gone


def test_checkpoints_hold_the_same_place_in_the_log_whatever_happened(tmp_path: Path) -> None:
    attempt(tmp_path / "whole", saves={2, 6})
    killed(tmp_path / "killed", saves={2}, dies_at=5)
    attempt(tmp_path / "killed", saves={6})
    states = [
        Checkpoint.open(tmp_path / name / "checkpoints/checkpoint_1").load()["train"]["run"]["log"]
        for name in ("whole", "killed")
    ]
    assert states[0] == states[1] == {"rows": 6, "last_step": 6}


def test_an_evaluation_at_the_end_of_an_epoch_is_there_once(tmp_path: Path) -> None:
    """The checkpoint at an epoch's last batch comes before the epoch's evaluation, which runs again."""
    attempt(tmp_path / "whole", epochs=2)
    expected = curve(read_log(tmp_path / "whole"))
    killed(tmp_path / "killed", saves={STEPS}, dies_at=STEPS + 3, epochs=2)
    attempt(tmp_path / "killed", epochs=2)
    assert curve(read_log(tmp_path / "killed")) == expected


def test_checkpoints_in_directories_of_ones_own_go_on_in_the_same_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As scripts for Accelerate do: numbered by hand, loaded by name, trackers first."""
    for start in (0, 2, 4):
        accelerator = Accelerator(cpu=True, project_dir=tmp_path, log_with="jsonl")
        model, optimizer, loader = training(accelerator)
        accelerator.init_trackers("p", {"a": 1})
        if start:
            accelerator.load_state(tmp_path / f"step_{start}")
        for (x,) in loader:
            accelerator.backward(model(x).square().mean())
            optimizer.step()
            accelerator.log({"step": accelerator.step}, step=accelerator.step)
            if accelerator.step in (2, 4):
                accelerator.save_state(tmp_path / f"step_{accelerator.step}")
            if accelerator.step == start + 3:
                break
        accelerator.end_training()
    log = read_log(tmp_path)
    assert [(row.step, row.attempt) for row in log] == [
        (1, 1),
        (2, 1),
        (3, 2),
        (4, 2),
        (5, 3),
        (6, 3),
        (7, 3),
    ]
    assert (len(log.runs), log.project) == (1, "p")
    table = (tmp_path / "p" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["_step"] for line in table] == list(range(1, 8))
    assert "begun a new run" not in caplog.text


def test_looking_back_at_an_older_checkpoint_costs_no_row(tmp_path: Path) -> None:
    attempt(tmp_path, saves={2, 6})
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    training(accelerator)
    accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_0")
    accelerator.log({"test": 1.0}, step=100)
    accelerator.end_training()
    assert [row.step for row in read_log(tmp_path)] == [*range(1, STEPS + 1), STEPS, 100]


def test_training_on_from_an_older_checkpoint_rewinds(tmp_path: Path) -> None:
    attempt(tmp_path, saves={2, 6})
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    model, optimizer, loader = training(accelerator)
    accelerator.load_state(tmp_path / "checkpoints" / "checkpoint_0")
    accelerator.log({"loaded": True}, step=2)
    (x,) = next(iter(loader))
    accelerator.backward(model(x).mean())
    optimizer.step()
    accelerator.log({"loss": 0.0}, step=3)
    accelerator.save_state()
    rows = read_log(tmp_path).rows
    assert [row.step for row in rows] == [1, 2, 2, 3]
    assert [row.attempt for row in rows] == [1, 1, 2, 2]
    # The newer checkpoint of the first attempt still knows its own rows.
    again = Accelerator(cpu=True, project_dir=tmp_path)
    model, optimizer, loader = training(again)
    again.load_state(tmp_path / "checkpoints" / "checkpoint_1")
    for (x,) in loader:
        again.backward(model(x).mean())
        optimizer.step()
        again.log({"loss": 0.0}, step=again.step)
    assert [row.step for row in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_begins_anew_does_not_tangle_with_the_one_before(tmp_path: Path) -> None:
    attempt(tmp_path, saves=set())
    attempt(tmp_path, saves=set(), stop_after=3)
    log = read_log(tmp_path)
    assert [row.step for row in log] == [1, 2, 3, 3]
    assert len(log.runs) == 2
    assert len(read_log(tmp_path, run=log.runs[0])) == STEPS + 1
    with pytest.raises(UsageError, match=f"no rows of run 'x'; it has: {log.runs[0]}, {log.runs[1]}"):
        read_log(tmp_path, run="x")


def test_a_log_that_was_lost_begins_again_where_the_run_goes_on(tmp_path: Path) -> None:
    killed(tmp_path, saves={2}, dies_at=5)
    (tmp_path / "log.jsonl").unlink()
    attempt(tmp_path)
    log = read_log(tmp_path)
    assert [row.step for row in log] == [*range(3, STEPS + 1), STEPS]
    assert (log.rows[0].attempt, log.project) == (2, "curve")


def test_a_log_cut_short_by_a_power_cut_goes_on(tmp_path: Path) -> None:
    killed(tmp_path, saves={3}, dies_at=5)
    path = tmp_path / "log.jsonl"
    data = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(data[:4]) + data[4][:20])  # started, project, rows 1 and 2, a torn row 3
    attempt(tmp_path)
    log = read_log(tmp_path)
    assert [row.step for row in log] == [1, 2, *range(4, STEPS + 1), STEPS]
    assert log.damaged_lines == 1


def test_every_cut_leaves_a_readable_log(tmp_path: Path) -> None:
    killed(tmp_path, saves={2}, dies_at=4)
    killed(tmp_path, dies_at=5)
    data = (tmp_path / "log.jsonl").read_bytes()
    steps = []
    for size in sorted(
        {*range(0, len(data), 17), *(i + 1 for i, byte in enumerate(data) if byte == 10), len(data)}
    ):
        (tmp_path / "cut.jsonl").write_bytes(data[:size])
        log = read_log(tmp_path / "cut.jsonl")
        steps.append([row.step for row in log])
        assert log.damaged_lines == (size > 0 and data[size - 1 : size] != b"\n")
    wanted = [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert [steps[i] for i in range(len(steps)) if i == 0 or steps[i] != steps[i - 1]] == wanted


def test_garbage_in_the_middle_costs_only_itself(tmp_path: Path) -> None:
    attempt(tmp_path)
    path = tmp_path / "log.jsonl"
    data = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*data[:4], b"\0" * 50 + b"\n", b'{"kind": "row", "run": "x"}\n', *data[5:]]))
    log = read_log(path)
    assert [row.step for row in log] == [1, 2, *range(4, STEPS + 1), STEPS]
    assert log.damaged_lines == 2


VALUES = {
    "int": 3,
    "float": 0.25,
    "string": "text",
    "bool": True,
    "none": None,
    "nested": {"deeper": {"x": torch.tensor(2.0)}},
    "tensor": torch.tensor([7]),
    "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
    "numpy": np.float32(0.5),
    "array": np.array([4]),
    "flag": torch.tensor(True),
    "list": [1, 2.5],
}


def test_values_come_back_as_plain_ones(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.log(VALUES)
    accelerator.log({"nan": math.nan, "inf": torch.tensor(math.inf), "low": {"x": -math.inf}})
    first, second = read_log(tmp_path)
    assert first.values == {
        **{name: VALUES[name] for name in ("int", "float", "string", "bool", "none", "list")},
        "nested": {"deeper": {"x": 2.0}},
        "tensor": 7,
        "bf16": 0.5,
        "numpy": 0.5,
        "array": 4,
        "flag": True,
    }
    assert second.values["inf"] == math.inf
    assert second.values["low"] == {"x": -math.inf}
    assert math.isnan(second.values["nan"])
    # As strings: `NaN` without quotes is no JSON, and most readers refuse it.
    assert lines(tmp_path)[2]["values"] == {"nan": "NaN", "inf": "Infinity", "low": {"x": "-Infinity"}}
    assert [first.step, second.step] == [0, 1]


def test_text_that_has_no_bytes_and_lists_of_dicts_are_kept(tmp_path: Path) -> None:
    half = "\udcff"  # what Python makes of a byte that is no UTF-8, as in a file's name
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    config = {"data": [{"path": Path("a"), "weight": np.float32(0.5)}, {"path": half}], "kinds": (1, [2])}
    accelerator.init_trackers("run", {**config, "odd": [{"of": {1}}]})
    accelerator.log({"name": half, half: 1, "parts": [{"x": 1, "y": math.inf}]})
    log = read_log(tmp_path)
    assert log.config == {
        "data": [{"path": "a", "weight": 0.5}, {"path": half}],
        "kinds": [1, [2]],
        "odd": [{}],
    }
    assert log.rows[0].values == {"name": half, half: 1, "parts": [{"x": 1, "y": math.inf}]}
    assert lines(tmp_path)[1]["left_out"] == ["odd/0/of (builtins.set)"]


def test_what_a_log_cannot_hold_is_left_out_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    for _ in range(2):
        accelerator.log({"loss": 1.0, "weights": torch.zeros(2), "nested": {"thing": object()}})
    row = read_log(tmp_path).rows[0]
    assert row.values == {"loss": 1.0, "nested": {}}
    assert row.left_out == {"weights": "torch.Tensor", "nested/thing": "builtins.object"}
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [text.partition(" ")[0] for text in told] == ["weights", "nested/thing"]


@pytest.mark.parametrize(
    ("values", "step", "words"),
    [
        ([1.0], 1, "takes a mapping of names to values.*list"),
        ({1: 2.0}, 1, "the name 1 .int.; names must be strings"),
        ({"x": 1.0}, "1", "step='1'"),
        ({"x": 1.0}, 1.5, "step must be an integer"),
        ({"x": 1.0}, True, "step must be an integer"),
    ],
)
def test_bad_arguments_are_told_and_log_nothing(tmp_path: Path, values: Any, step: Any, words: str) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    with pytest.raises(UsageError, match=words):
        accelerator.log(values, step=step)
    accelerator.log({"x": 1.0}, step=torch.tensor(4))
    assert [row.step for row in read_log(tmp_path)] == [4]


def test_without_a_step_rows_count_on_over_a_resume(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    training(accelerator)
    accelerator.log({"x": 0})
    accelerator.log({"x": 1}, step=10)
    accelerator.save_state()
    accelerator.log({"x": 2})
    resumed = Accelerator(cpu=True, project_dir=tmp_path)
    training(resumed)
    resumed.resume()
    resumed.log({"x": 2})
    assert [row.step for row in read_log(tmp_path)] == [0, 10, 11]


def test_a_row_of_an_earlier_step_takes_no_step_back(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    for step in (10, 3, None):
        accelerator.log({"x": 0}, step=step)
    assert [row.step for row in read_log(tmp_path)] == [10, 3, 11]


def test_without_a_place_or_a_tracker_that_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.log({"x": 1})
    accelerator.log({"x": 1})
    assert [r.getMessage() for r in caplog.records if "nowhere to write" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_full_disk_costs_rows_and_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(Path("/dev/full"))
    for step in range(3):
        log.row(run="r", attempt=1, step=step, values={"x": 1})
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full can't be written, and what is logged is lost: [Errno 28] No space left on device"
    ]


def test_no_log_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no log at .*log\.jsonl"):
        read_log(tmp_path)


def test_a_long_log_is_read_to_its_end(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.started(run="r")
    line = b'{"kind": "row", "run": "r", "attempt": 1, "time": 1.0, "step": %d, "values": {"loss": 0.5}}\n'
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.writelines(line % step for step in range(20_000))
    log.resumed(run="r", attempt=2, rows=15_000, come_from=None, kept_from=None)
    assert len(read_log(tmp_path)) == 15_000


_KILLED_FOR_REAL = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.forked import run_program, start_program
from tests.track.runs import attempt
attempt(Path(sys.argv[1]), saves=set(range(0, 3000, 10)), epochs=int(sys.argv[2]))
"""


def test_sigkill_at_any_instant_leaves_the_curve_of_an_uninterrupted_run(tmp_path: Path) -> None:
    epochs = 12
    attempt(tmp_path / "whole", saves={10}, epochs=epochs)
    expected = curve(read_log(tmp_path / "whole"))
    project = tmp_path / "killed"
    process = start_program(_KILLED_FOR_REAL, project, epochs)
    while process.poll() is None and _lines(project) < 35:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.communicate()[0]
    process.communicate()
    steps = [row.step for row in read_log(project)]
    assert steps == sorted(steps)
    done = run_program(_KILLED_FOR_REAL, project, epochs)
    assert done.returncode == 0, done.stdout
    log = read_log(project)
    assert curve(log) == expected
    assert max(row.attempt for row in log) == 2


def _lines(project: Path) -> int:
    path = project / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
