"""`keepstep tune`: experiments and trials, from journals as a driver writes them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.cli.processes import on_terminal, run, without_styles

from keepstep.cli.main import main
from keepstep.cli.tune import command
from keepstep.tune.experiment.journal import Journal, LocalLog
from keepstep.tune.experiment.records import (
    DriverStarted,
    ExperimentEnded,
    ExperimentMade,
    ResultReported,
    TrialFailed,
    TrialMade,
    TrialStarted,
)

TIME = 1.8e9
OPTIONS = {
    "ls": ["path", "--json", "--metric", "--sort", "--status", "--last"],
    "show": ["path", "trial", "--json"],
    "best": ["path", "--metric", "--scope", "--json"],
}
LOSSES = [[4.0, 1.0, 3.0], [5.0, 2.0, 2.0], [9.0, math.nan]]


def write_experiment(root: Path, *, ended: bool = True, spec: dict[str, Any] | None = None) -> Path:
    """Three trials: one ended, one ended, one failed; a checkpoint with every second result."""
    journal = Journal(LocalLog(root / "journal.jsonl"))
    spec = {"metric": "loss", "mode": "min"} if spec is None else spec
    made = ExperimentMade(time=TIME, id="e1", name=root.name, trainable="train", seed=1, spec=spec)
    journal.add(made)
    journal.add(DriverStarted(time=TIME, host="h", pid=1))
    for number, losses in enumerate(LOSSES):
        trial = f"e1_{number:05d}"
        config = {"lr": 0.1 * (number + 1), "layer": {"width": number}}
        journal.add(
            TrialMade(
                time=TIME,
                trial=trial,
                config=config,
                evaluated={"lr": config["lr"]},
                tag=f"{number}",
                dirname=f"train_{trial}",
                resources={"cpu": 1.0},
            )
        )
        journal.add(TrialStarted(time=TIME, trial=trial, pid=1, host="h", ip="127.0.0.1"))
        for iteration, loss in enumerate(losses, 1):
            last = iteration == len(losses) and number < 2
            journal.add(
                ResultReported(
                    time=TIME + iteration,
                    trial=trial,
                    iteration=iteration,
                    metrics={"loss": loss, "eval": {"acc": iteration / 10}},
                    this_s=0.5,
                    total_s=0.5 * iteration,
                    since=iteration,
                    decision="STOP" if last else "CONTINUE",
                    why="done" if last else None,
                    checkpoint=f"checkpoint_{iteration // 2:06d}" if iteration % 2 == 0 else None,
                    bytes=1000 * iteration,
                )
            )
    journal.add(TrialFailed(time=TIME + 9, trial="e1_00002", error="ValueError: no\x1b[31m", final=True))
    if ended:
        journal.add(ExperimentEnded(time=TIME + 10, why="all"))
    journal.commit()
    journal.close()
    return root


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def document(*arguments: str | Path) -> dict[str, Any]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.output)
    return found


def test_ls_and_verify_of_an_experiment_name_the_commands_that_look_at_it(tmp_path: Path) -> None:
    write_experiment(tmp_path / "digits")
    for command_name in ("ls", "verify"):
        done = run(command_name, str(tmp_path / "digits"))
        assert done.returncode == 2
        assert f"`keepstep tune ls {tmp_path / 'digits'}` lists them" in done.stderr


def test_the_commands_and_their_options_are_these() -> None:
    assert {name: [p.opts[0] for p in one.params] for name, one in command.commands.items()} == OPTIONS
    for name in OPTIONS:
        assert "Exit codes:\n    0  " in call(name, "--help").output


def test_ls_of_an_experiment(tmp_path: Path) -> None:
    place = write_experiment(tmp_path / "digits")
    lines = call("ls", place).output.splitlines()
    assert lines[0].split() == [
        "trial",
        "status",
        "ended",
        "by",
        "iter",
        *("time", "lr", "loss", "eval/acc", "checkpoints"),
    ]
    assert lines[1].split() == [
        "train_e1_00000",
        "TERMINATED",
        "itself",
        "3",
        "1.5",
        "0.1",
        "3.0",
        "0.3",
        "1",
    ]
    assert lines[3].split()[:3] == ["train_e1_00002", "ERROR", "error"]
    assert lines[4] == "# 3 trials: 1 error, 2 terminated; ended: all"
    assert "\x1b" not in call("ls", place).output
    by_loss = call("ls", place, "--sort", "loss", "--metric", "loss").output.splitlines()
    assert [line.split()[0][-1] for line in by_loss[1:4]] == ["2", "0", "1"]
    assert "eval/acc" not in by_loss[0]
    assert len(call("ls", place, "--status", "error").output.splitlines()) == 3
    assert call("ls", place, "--last", "1").output.splitlines()[1].startswith("train_e1_00002")


def test_ls_as_json(tmp_path: Path) -> None:
    found = document("ls", write_experiment(tmp_path / "digits"))
    assert set(found) == {
        *("path", "name", "trainable", "state", "metric", "mode", "counts", "updated_at", "trials")
    }
    assert (found["state"], found["counts"]) == ("ended: all", {"TERMINATED": 2, "ERROR": 1})
    trial = found["trials"][0]
    assert set(trial) == {
        *("trial_id", "number", "name", "status", "ended_by", "iteration", "time_total_s", "config"),
        *("evaluated_params", "last_result", "checkpoint", "failures", "error", "path"),
    }
    assert trial["config"] == {"lr": 0.1, "layer": {"width": 0}}
    assert trial["checkpoint"] == f"{tmp_path}/digits/train_e1_00000/checkpoint_000001"
    assert found["trials"][2]["last_result"]["loss"] == "nan"


def test_ls_of_a_directory_of_experiments(tmp_path: Path) -> None:
    write_experiment(tmp_path / "a")
    write_experiment(tmp_path / "b", ended=False)
    damaged = write_experiment(tmp_path / "c") / "journal.jsonl"
    lines = damaged.read_bytes().splitlines(keepends=True)
    damaged.write_bytes(b"".join([lines[0], b"x\n", *lines[2:]]))
    (tmp_path / "other").mkdir()
    done = call("ls", tmp_path)
    rows = [line.split() for line in done.output.splitlines()]
    assert rows[1][:7] == ["a", "ended:", "all", "3", "2", "1", "loss=2.0"]
    assert rows[2][:2] == ["b", "open"]
    assert rows[3][:2] == ["c", "damaged"]
    found = document("ls", tmp_path)["experiments"]
    assert found[0]["best"] == {"trial_id": "e1_00001", "value": 2.0}
    assert "line 2 of" in found[2]["problem"]


@pytest.mark.parametrize("said", ["e1_00001", "1", "train_e1_00001", None])
def test_show_of_a_trial(tmp_path: Path, said: str | None) -> None:
    place = write_experiment(tmp_path / "digits")
    (place / "train_e1_00001").mkdir()
    arguments = (place / "train_e1_00001",) if said is None else (place, said)
    found = document("show", *arguments)
    assert [result["loss"] for result in found["results"]] == [5.0, 2.0, 2.0]
    assert found["results"][1]["training_iteration"] == 2
    assert found["checkpoints"] == [
        {
            "name": "checkpoint_000001",
            "path": f"{place}/train_e1_00001/checkpoint_000001",
            "iteration": 2,
            "bytes": 2000,
            "metrics": found["checkpoints"][0]["metrics"],
        }
    ]
    text = call("show", *arguments).output
    assert "layer/width  1" in text
    assert "last 3 of 3 results" in text
    assert "1 checkpoint\n" in text


def test_best(tmp_path: Path) -> None:
    place = write_experiment(tmp_path / "digits")
    found = document("best", place)
    assert (found["trial_id"], found["value"], found["mode"]) == ("e1_00001", 2.0, "min")
    assert found["checkpoint"] == f"{place}/train_e1_00001/checkpoint_000001"
    assert document("best", place, "--scope", "all")["trial_id"] == "e1_00000"
    assert document("best", place, "--metric", "eval/acc")["trial_id"] == "e1_00000"
    assert document("best", place, "--metric", "loss:max")["trial_id"] == "e1_00000"
    assert "checkpoint_000001" in call("best", place).output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ls", "nothing"], "there is nothing at"),
        (["ls", "file"], "is a file"),
        (["ls", "empty"], "there is no experiment in"),
        (["ls", "e", "--sort", "acc"], "no trial here has the metric 'acc'; there are: loss, eval/acc"),
        (["ls", "e", "--status", "lost"], "they are: ERROR, TERMINATED"),
        (["show", "e"], "is an experiment of 3 trials; name one: train_e1_00000"),
        (["show", "e", "7"], "has no trial '7'"),
        (["best", "none"], "pass --metric NAME, one of: loss, eval/acc"),
        (["best", "none", "--metric", "eval"], "no trial here has the metric 'eval'"),
        (["best", "e/train_e1_00000"], "journal.jsonl is missing"),
    ],
)
def test_what_can_not_be_shown_is_one_line(workdir: Path, arguments: list[str], words: str) -> None:
    write_experiment(workdir / "e")
    write_experiment(workdir / "none", spec={})
    (workdir / "empty").mkdir()
    (workdir / "file").write_text("")
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.output.startswith("keepstep: ")
    assert done.output.count("\n") == 1
    assert words in done.output


def test_an_experiment_is_readable_while_it_runs_and_its_end_is_torn(tmp_path: Path) -> None:
    place = write_experiment(tmp_path / "digits", ended=False)
    with (place / "journal.jsonl").open("ab") as file:
        file.write(b'{"kind":"done","time":1')
    assert document("ls", place)["state"] == "open"


def test_on_a_terminal_what_matters_least_makes_room(tmp_path: Path) -> None:
    place = write_experiment(tmp_path / "digits")
    text = without_styles(on_terminal("tune", "ls", place, width=60))
    assert max(map(len, text.splitlines())) <= 60
    assert "train_e1_00001" in text
    assert "ValueError: no" in text
    assert "no room for" in text


def test_through_a_pipe_nothing_heavy_is_imported(tmp_path: Path) -> None:
    place = write_experiment(tmp_path / "digits")
    done = run("tune", "best", place)
    assert done.returncode == 0, done.stderr
    assert "train_e1_00001" in done.stdout
