"""`keepstep ls`: rows, order, what is exact, what is fitted, what is escaped."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from tests.cli.processes import on_terminal, without_styles
from tests.cli.stores import MANIFEST_KEYS, write_checkpoint, write_store

from keepstep.cli.main import main

METRICS = ["val_loss", "lr", "accuracy"]
NASTY = "x\x1b[31m\x07\u202e\n[red]m[/]"
ESCAPED = r"x\x1b[31m\x07\u202e\n[red]m[/]"


def ls(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, ["ls", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def names(*arguments: str | Path) -> list[str]:
    return [line.split()[0] for line in ls(*arguments).splitlines() if line.startswith("checkpoint_")]


def document(*arguments: str | Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not strict JSON")

    loaded = json.loads(ls(*arguments, "--json"), parse_constant=refuse)
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Losses 4, 2, 4/3, 1 and NaN; one pinned, one tagged, one whose model is gone."""
    root = write_store(tmp_path / "checkpoints", 3)
    write_checkpoint(root / "checkpoint_3", number=3, tags=("release", "a b"), pinned=True)
    write_checkpoint(root / "checkpoint_10", number=10, metrics={"val_loss": math.nan, "lr": -math.inf})
    (root / "checkpoint_1" / "model.safetensors").unlink()
    return root


def test_a_line_for_each_with_exact_values(store: Path) -> None:
    lines = ls(store).splitlines()
    assert lines[0].split() == ["name", "step", "epoch", "created", "bytes", *METRICS, "tags", "health"]
    assert lines[3].split()[:7] == [
        "checkpoint_2", "200", "1", "2026-01-01T00:02:00+00:00", "9851", repr(4 / 3), "-"
    ]  # fmt: skip
    assert lines[2].endswith("damaged: the file model.safetensors (4254 bytes) is missing")
    assert lines[4].endswith("pinned,release,a b  ok")
    assert lines[5].split()[5:7] == ["nan", "-inf"]
    assert lines[6].startswith("# 5 checkpoints, 1 damaged, ")


def test_a_project_and_a_single_checkpoint_and_the_current_directory(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names(store.parent) == names(store) == [f"checkpoint_{n}" for n in (0, 1, 2, 3, 10)]
    assert names(store / "checkpoint_3") == ["checkpoint_3"]
    monkeypatch.chdir(store / "checkpoint_3")
    assert names() == ["checkpoint_3"]
    monkeypatch.chdir(store.parent)
    (store.parent / "latest").symlink_to("checkpoints/checkpoint_10")
    assert names("latest") == ["checkpoint_10"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--last", "2"], [3, 10]),
        (["--last", "0"], [0, 1, 2, 3, 10]),
        (["--reverse"], [10, 3, 2, 1, 0]),
        (["--sort", "step", "--reverse", "--last", "2"], [10, 3]),
        (["--sort", "created"], [0, 1, 2, 3, 10]),
        (["--sort", "val_loss"], [10, 0, 1, 2, 3]),
        (["--sort", "val_loss:max"], [10, 3, 2, 1, 0]),
        (["--sort", "accuracy", "--last", "1"], [3]),
        (["--damaged"], [1]),
    ],
)
def test_order_and_choice(store: Path, arguments: list[str], expected: list[int]) -> None:
    assert names(store, *arguments) == [f"checkpoint_{number}" for number in expected]
    rows = document(store, *arguments)["checkpoints"]
    assert [row["name"] for row in rows] == [f"checkpoint_{number}" for number in expected]


def test_a_metric_can_be_picked(store: Path) -> None:
    header = ls(store, "--metric", "lr", "--metric", "accuracy").splitlines()[0].split()
    assert header[5:7] == ["lr", "accuracy"]
    assert "val_loss" not in header


def test_a_metric_that_is_not_there_is_named_with_those_that_are(store: Path) -> None:
    done = CliRunner().invoke(main, ["ls", str(store), "--metric", "loss"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'loss'" in done.stderr
    assert "val_loss, lr, accuracy" in done.stderr


def test_json_is_whole_and_strict(store: Path) -> None:
    found = document(store)
    keys = [
        "bytes_free",
        "bytes_on_disk",
        "checkpoints",
        "count",
        "damaged",
        "path",
        "set_aside",
        "unreadable",
    ]
    assert sorted(found) == keys
    assert (found["count"], found["damaged"], found["set_aside"], found["path"]) == (5, 1, 0, str(store))
    row = found["checkpoints"][3]
    assert set(row) == MANIFEST_KEYS | {"name", "path", "health", "problem"}
    assert (row["step"], row["tags"], row["pinned"], row["health"]) == (300, ["release", "a b"], True, "ok")
    assert found["checkpoints"][1]["problem"] == "the file model.safetensors (4254 bytes) is missing"
    assert found["checkpoints"][4]["metrics"] == {"val_loss": "nan", "lr": "-inf"}


def test_a_mangled_manifest_is_a_row_too(store: Path) -> None:
    (store / "checkpoint_2" / "manifest.json").write_text("{")
    row = document(store)["checkpoints"][2]
    assert (row["health"], row["step"], row["metrics"], row["bytes"]) == ("damaged", None, None, None)
    assert "manifest.json: not valid JSON" in row["problem"]
    assert names(store, "--sort", "val_loss")[0] == "checkpoint_2"


def test_hard_links_are_counted_once(store: Path) -> None:
    before = document(store)["bytes_on_disk"]
    os.link(store / "checkpoint_0" / "model.safetensors", store / "checkpoint_0" / "again")
    assert document(store)["bytes_on_disk"] == before
    assert before == sum(file.stat().st_size for file in store.rglob("*") if file.is_file()) - 4254


def test_what_is_pruned_while_listing_is_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keepstep.cli.locate.place_exists", lambda path: "checkpoint_1" not in str(path))
    assert [row["name"] for row in document(store)["checkpoints"]] == [
        f"checkpoint_{number}" for number in (0, 2, 3, 10)
    ]


def test_huge_numbers_and_other_kinds_of_metrics(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_0", metrics={"score": 10**400, "note": "a b", "flag": True})
    write_checkpoint(tmp_path / "checkpoint_1", number=1, metrics={"score": 1.5})
    assert names(tmp_path, "--sort", "score") == ["checkpoint_1", "checkpoint_0"]
    assert str(10**400) in ls(tmp_path)
    assert "1.5" in on_terminal("ls", tmp_path, width=80)


# ----------------------------------------------------------------------------------- on a terminal


@pytest.mark.parametrize("width", [1, 9, 20, 40, 80, 120, 250])
def test_no_line_is_wider_than_the_terminal(store: Path, width: int) -> None:
    write_checkpoint(
        store / "checkpoint_11", number=11, metrics={"损失" * 9: 1.0, "b" * 60: 2.0}, tags=("标" * 50,)
    )
    (store / "checkpoint_2" / "manifest.json").write_text("{")
    text = without_styles(on_terminal("ls", store, width=width))
    assert "Traceback" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= max(width, 12)
    if width >= 30:
        assert text.count("\ncheckpoint_") == 6


def test_a_terminal_shows_sizes_the_best_and_the_reason_below(store: Path) -> None:
    text = on_terminal("ls", store, width=120)
    assert "9.85 kB" in text
    assert "\x1b[1;32m1\x1b[0m" in text  # the smallest loss, not NaN
    assert "\x1b[1;32m0.003\x1b[0m" in text  # the largest accuracy
    assert "\n    the file model.safetensors (4254 bytes) is missing\n" in without_styles(text)
    assert "5 checkpoints · 1 damaged · " in text


def test_a_terminal_shows_the_last_rows_and_says_so(tmp_path: Path) -> None:
    write_store(tmp_path, 45)
    write_checkpoint(tmp_path / "checkpoint_45", number=45, metrics={"val_loss": 9.0})
    write_checkpoint(tmp_path / "checkpoint_46", number=46, metrics={"val_loss": 0.001})
    for _ in range(2):
        text = without_styles(on_terminal("ls", tmp_path, "--sort", "created", "--reverse", width=80))
        assert "40 of 47 shown; --last 0 shows all" in text
    shown = without_styles(on_terminal("ls", tmp_path, "--last", "0", width=80))
    assert shown.count("\ncheckpoint_") == 47
    first = without_styles(on_terminal("ls", tmp_path, "--sort", "val_loss:max", width=80))
    assert "best val_loss" not in first


def test_the_best_out_of_sight_is_named(tmp_path: Path) -> None:
    write_store(tmp_path, 3)
    write_checkpoint(tmp_path / "checkpoint_3", number=3, metrics={"val_loss": 7.0})
    text = without_styles(on_terminal("ls", tmp_path, "--last", "1", width=80))
    assert "best val_loss: 1.33333 in checkpoint_2" in text


def test_no_color_is_heeded(store: Path) -> None:
    text = on_terminal("ls", store, width=80, environment={"NO_COLOR": "1"})
    assert "\x1b[1;32m" not in text
    assert "\x1b" not in on_terminal("ls", store, width=80, environment={"TERM": "dumb"})


def test_nothing_in_a_name_reaches_the_terminal_or_is_markup(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_0", metrics={NASTY: 1.0, "note": NASTY}, tags=(NASTY,))
    for text in (on_terminal("ls", tmp_path, width=250), ls(tmp_path)):
        assert text.count(ESCAPED) == 3
        assert "\x07" not in text
        assert "\x1b[31m" not in text
        assert "\u202e" not in text


def test_checkpoints_of_names_that_a_script_chose_are_listed(tmp_path: Path) -> None:
    for name in ("epoch_1", "best"):
        write_checkpoint(tmp_path / "out" / name)
    (tmp_path / "out" / "logs").mkdir()
    assert [name for name in ("epoch_1", "best", "logs") if name in ls(tmp_path / "out")] == [
        "epoch_1",
        "best",
    ]
    assert "epoch_1" in ls(tmp_path / "out" / "epoch_1")
    done = CliRunner().invoke(main, ["show", str(tmp_path / "out"), "0"])
    assert (done.exit_code, "there is no checkpoint '0'" in done.stderr) == (2, True), "they have no numbers"
