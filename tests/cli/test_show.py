"""`keepstep show`: one checkpoint, from its manifest and the tensor index."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from tests.checkpoint.test_recovery import newer_format
from tests.cli.processes import on_terminal, without_styles
from tests.cli.stores import MANIFEST_KEYS, write_checkpoint, write_store

from keepstep.checkpoint.format.manifest import Chunk, TensorEntry
from keepstep.cli.main import main
from keepstep.cli.show import _file

NASTY = "x\x1b[31m\x07\n[red]m[/]"
ESCAPED = r"x\x1b[31m\x07\n[red]m[/]"


def show(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["show", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    root = write_store(tmp_path / "checkpoints", 2)
    write_checkpoint(root / "checkpoint_2", number=2, tags=("release",), metrics={"val_loss": math.nan})
    return root


def test_everything_in_the_manifest_is_there(store: Path) -> None:
    done = show(store)
    assert done.exit_code == 0
    for text in (
        "checkpoint_2  ok\n",
        "  step     200\n",
        "  epoch    1\n",
        "  created  2026-01-01T00:02:00+00:00\n",
        "  tags     release\n",
        "\nmetrics\n  val_loss  nan\n",
        "  parent   0000000000000001 (checkpoint_1)\n",
        "  run      305628e9ac23b9bd\n",
        "  attempt  1\n",
        "  host     node-17\n",
        "  command  train.py --name 'a b'\n",
        "  git      23eccee041e83e23444371ab2c05707a621c7aff with uncommitted changes\n",
        "  torch    2.13.0+cpu\n",
        "  model.safetensors       4254  ",
    ):
        assert text in done.stdout
    assert done.stdout.endswith(
        "  group      tensors  elements  bytes  dtypes\n"
        "  model            5        72    158  int64,float32,bfloat16\n"
        "  optimizer        4        40    158  int64,float32,bfloat16\n"
        "\n"
        "tensors by dtype\n"
        "  dtype     tensors  elements  bytes\n"
        "  float32         5       104    288\n"
        "  int64           2         2     16\n"
        "  bfloat16        2         6     12\n"
    )


def test_a_name_a_number_or_a_path_picks_one(store: Path) -> None:
    for arguments in ((store, "checkpoint_1"), (store, "1"), (store / "checkpoint_1",), (store.parent, "1")):
        assert show(*arguments).stdout.startswith("checkpoint_1  ok\n")
    done = show(store, "7")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no checkpoint '7'" in done.stderr
    assert "checkpoint_0, checkpoint_1, checkpoint_2" in done.stderr
    assert show(store / "checkpoint_1", "checkpoint_1").exit_code == 2


def test_the_default_is_the_newest_valid_one(store: Path) -> None:
    (store / "checkpoint_2" / "model.safetensors").unlink()
    done = show(store)
    assert done.stdout.startswith("checkpoint_1  ok\n")
    assert done.stderr == (
        "passing over checkpoint_2, which is damaged: the file model.safetensors (4254 bytes) is missing\n"
    )
    named = show(store, "2")
    assert named.stdout.startswith("checkpoint_2  damaged\n")
    assert "the file model.safetensors (4254 bytes) is missing" in named.stdout
    for number in (0, 1):
        (store / f"checkpoint_{number}" / "model.safetensors").unlink()
    assert show(store).exit_code == 2


def test_what_a_newer_keepstep_wrote_is_not_passed_over(store: Path) -> None:
    newer_format(store / "checkpoint_2")
    done = show(store)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "checkpoint_2 can't be read" in done.stderr
    assert "upgrade keepstep" in done.stderr
    assert "damaged" not in done.stderr
    assert show(store, "1").exit_code == 0


def test_what_a_newer_keepstep_wrote_is_not_listed_as_damaged(store: Path) -> None:
    newer_format(store / "checkpoint_1")
    listed = CliRunner().invoke(main, ["ls", "--json", str(store)])
    said = json.loads(listed.stdout)
    assert [one["health"] for one in said["checkpoints"]] == ["ok", "unreadable", "ok"]
    assert (said["damaged"], said["unreadable"]) == (0, 1)
    assert "1 unreadable" in CliRunner().invoke(main, ["ls", str(store)]).stdout
    verified = CliRunner().invoke(main, ["verify", str(store)])
    assert verified.exit_code == 2
    assert verified.stderr == "keepstep: 1 checkpoint could not be read, and may well be whole\n"
    assert "checkpoint_1  unreadable: " in verified.stdout
    assert "2 checkpoints sound, 0 damaged, 1 unreadable" in verified.stdout
    (store / "checkpoint_0" / "model.safetensors").unlink()
    assert CliRunner().invoke(main, ["verify", str(store)]).exit_code == 1


def test_a_damaged_index_leaves_the_rest_to_be_seen(store: Path) -> None:
    state = store / "checkpoint_2" / "state.json"
    state.write_bytes(state.read_bytes().replace(b"float32", b"float16"))
    done = show(store, "2")
    assert done.exit_code == 0
    assert "damaged\n" in done.stdout
    assert "state.json has the digest" in done.stdout
    assert "tensors by group" not in done.stdout
    assert json.loads(show(store, "2", "--json").stdout)["groups"] is None
    assert show(store, "2", "--tensors").exit_code == 2


def test_a_manifest_that_cannot_be_read_is_an_error(store: Path) -> None:
    (store / "checkpoint_2" / "manifest.json").write_text("{")
    done = show(store, "2")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "manifest.json: not valid JSON" in done.stderr


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ([], 9),
        (["*"], 9),
        (["model"], 5),
        (["model/h.0"], 2),
        (["*.bias"], 2),
        (["optimizer/steps"], 1),
    ],
)
def test_tensors_are_listed_by_address_or_pattern(store: Path, pattern: list[str], expected: int) -> None:
    lines = show(store, "--tensors", *pattern).stdout.splitlines()
    assert lines[0].split() == ["name", "dtype", "shape", "bytes", "file", "alias_of"]
    assert len(lines) == expected + 2
    assert lines[-1].startswith(f"# {expected} tensor")
    assert len(json.loads(show(store, "--json", "--tensors", *pattern).stdout)["tensors"]) == expected


def test_a_tensor_and_an_alias(store: Path) -> None:
    text = show(store, "--tensors").stdout
    assert ["model/half", "bfloat16", "[3]", "6", "model.safetensors", "-"] in map(
        str.split, text.splitlines()
    )
    assert ["model/tied", "float32", "[4,8]", "0", "-", "model/h.0.weight"] in map(
        str.split, text.splitlines()
    )


def test_no_tensor_of_that_name(store: Path) -> None:
    done = show(store, "--tensors", "modle")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "'modle'" in done.stderr
    assert "addresses look like model/" in done.stderr


def test_json_has_everything(store: Path) -> None:
    found = json.loads(show(store, "--json").stdout)
    assert set(found) == MANIFEST_KEYS | {
        "name",
        "path",
        "health",
        "problem",
        "environment",
        "files",
        "groups",
        "dtypes",
    }
    assert found["metrics"] == {"val_loss": "nan"}
    assert found["groups"][0] == {
        "name": "model",
        "tensors": 5,
        "elements": 72,
        "bytes": 158,
        "dtypes": ["int64", "float32", "bfloat16"],
    }
    tensors = json.loads(show(store, "--json", "--tensors", "model/tied").stdout)["tensors"]
    assert (tensors[0]["alias_of"], tensors[0]["shape"]) == ("model/h.0.weight", [4, 8])


@pytest.mark.parametrize("width", [12, 30, 80, 120])
def test_no_line_is_wider_than_the_terminal(store: Path, width: int) -> None:
    for options in ([], ["--tensors"]):
        text = without_styles(on_terminal("show", store, *options, width=width))
        assert "Traceback" not in text
        assert max(cell_len(line) for line in text.splitlines()) <= max(width, 24)


def test_nothing_in_a_name_reaches_the_terminal_or_is_markup(tmp_path: Path) -> None:
    directory = write_checkpoint(
        tmp_path / "checkpoint_0",
        tensors={NASTY: ("float32", (2,))},
        metrics={NASTY: NASTY},
        tags=(NASTY,),
        environment={NASTY: NASTY, "command": [NASTY], "git": {"commit": NASTY}, "host": [NASTY]},
    )
    for text in (
        on_terminal("show", directory, width=300),
        on_terminal("show", directory, "--tensors", width=300),
        show(directory).stdout,
        show(directory, "--tensors").stdout,
    ):
        assert text.count(ESCAPED) >= 3
        assert "\x07" not in text
        assert "\x1b[31m" not in text


SAVING = {
    "rule": "max_overhead=0.01",
    "cost": {"blocked_s": 0.02, "waited_s": 0.0, "slowed_s": 0.08},
    "interval_s": 9.98,
    "interval_steps": 20,
    "counts": {"saved": 7, "failed": 0, "skipped": 2, "waited": 1, "waited_s": 0.5, "redone": 0},
}


def test_what_a_run_chose_about_saving_is_a_section(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "checkpoint_0", environment={"host": "a", "saving": SAVING})
    done = show(path)
    assert (
        "\nsaving\n"
        "  rule       max_overhead=0.01\n"
        "  interval   9.98 s, about 20 steps\n"
        "  cost       0.1 s a save (0.02 s blocked, 0 s waited for the copy, 0.08 s in slower steps)\n"
        "  before it  7 saved, 0 failed, 2 skipped, 1 waited, 0 redone, 0.5 s waited in all\n"
    ) in done.stdout
    assert "\nenvironment\n  host  a\n" in done.stdout
    assert json.loads(show(path, "--json").stdout)["environment"]["saving"] == SAVING


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("often", "  saving  often\n"),
        ({"rule": 3}, '  saving  {"rule": 3}\n'),
        ({"rule": "x", "cost": {"blocked_s": "much"}, "counts": 7}, "  cost      not known yet\n"),
        ({"rule": "x", "cost": None, "interval_s": None}, "  interval  not known yet\n"),
        ({"rule": "x", "counts": {"saved": True, "waited_s": "long"}}, "  before it  -\n"),
    ],
)
def test_what_says_it_in_another_way_is_shown_as_it_is(said: object, shown: str, tmp_path: Path) -> None:
    done = show(write_checkpoint(tmp_path / "checkpoint_0", environment={"saving": said}))
    assert done.exit_code == 0
    assert shown in done.stdout


def test_a_sharded_tensor_says_in_how_many_chunks_it_lies() -> None:
    chunks = tuple(
        Chunk(at=(n,), shape=(1,), file=f"model-{n}.safetensors", offset=4096, bytes=4, digest="0" * 32)
        for n in range(3)
    )
    entry = TensorEntry(dtype="float32", shape=(3,), offset=0, bytes=12, chunks=chunks)
    assert _file(entry) == "3 chunks in 3 files"


def test_the_place_in_the_log_is_told_in_words(tmp_path: Path) -> None:
    log = {"run": "5f2c", "attempt": 2, "offset": 1234}
    write_checkpoint(tmp_path / "checkpoint_0", environment={"log": log})
    assert re.search(r"log +1234 bytes, run 5f2c, attempt 2\n", show(tmp_path).stdout)
