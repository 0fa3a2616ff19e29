"""`keepstep verify`: every byte, every problem, the exit code."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.cli.processes import on_terminal, run, without_styles
from tests.cli.stores import write_store

from keepstep.checkpoint.keeping.verify import Report
from keepstep.cli.main import main


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)], catch_exceptions=False)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "checkpoints", 3)


def test_a_sound_store(store: Path) -> None:
    done = verify(store)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"checkpoint_{number}  ok" for number in range(3)]
    assert lines[3].startswith("# 3 checkpoints sound, 0 damaged, ")
    assert verify(store.parent).exit_code == 0
    assert verify(store / "checkpoint_2").stdout.startswith("checkpoint_2  ok\n")


def test_every_problem_is_on_the_line_of_its_checkpoint(store: Path) -> None:
    flip(store / "checkpoint_1" / "model.safetensors", -1)
    flip(store / "checkpoint_1" / "optimizer.safetensors", 4100)
    done = verify(store)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[1] == (
        "checkpoint_1  damaged: tensor 'model/half' in model.safetensors was changed: its digest differs; "
        "tensor 'optimizer/steps' in optimizer.safetensors was changed: its digest differs"
    )
    assert verify(store, "0", "checkpoint_2").exit_code == 0
    assert verify(store, "checkpoint_1").exit_code == 1
    assert verify(store, "--quick").exit_code == 0


def test_quick_sees_sizes_and_manifests(store: Path) -> None:
    (store / "checkpoint_0" / "model.safetensors").write_bytes(b"")
    (store / "checkpoint_1" / "manifest.json").write_text("[]")
    done = verify(store, "--quick")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert "model.safetensors has 0 bytes, but 4254 were committed" in lines[0]
    assert "manifest.json: expected a JSON object" in lines[1]
    assert lines[2] == "checkpoint_2  ok"


def test_unknown_names_and_names_of_a_single_checkpoint(store: Path) -> None:
    for arguments in ((store, "checkpoint_9"), (store / "checkpoint_0", "checkpoint_0")):
        done = verify(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1


def test_leftovers_are_mentioned_and_are_no_damage(store: Path) -> None:
    for name in ("checkpoint_3.tmp-ab12", "checkpoint_2.replaced", ".keepstep/damaged/checkpoint_8",
                 ".keepstep/trash/checkpoint_0.ff", "checkpoint_7"):  # fmt: skip
        (store / name).mkdir(parents=True)
    done = verify(store)
    assert done.exit_code == 0
    remarks = [line for line in done.stdout.splitlines() if line.startswith("# ")][:-1]
    assert [remark.split(":")[0] for remark in remarks] == [
        "# checkpoint_2.replaced",
        "# checkpoint_3.tmp-ab12",
        "# checkpoint_7",
        "# .keepstep/damaged/checkpoint_8",
        "# .keepstep/trash/checkpoint_0.ff",
    ]
    kinds = [left["kind"] for left in json.loads(verify(store, "--json").stdout)["leftovers"]]
    assert kinds == ["replaced", "unfinished", "no-manifest", "damaged", "trash"]


def test_a_store_of_leftovers_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_0.tmp-aaaaaaaaaaaa").mkdir()
    done = verify(tmp_path)
    assert done.exit_code == 2
    assert "only 1 leftover(s) of earlier ones: checkpoint_0.tmp" in done.stderr


def test_a_store_whose_checkpoints_were_all_set_aside_is_damage(store: Path) -> None:
    (store / ".keepstep" / "damaged").mkdir(parents=True)
    for number in range(3):
        (store / f"checkpoint_{number}").rename(store / ".keepstep" / "damaged" / f"checkpoint_{number}")
    for path in (store, store.parent):
        done = verify(path)
        assert done.exit_code == 1
        assert "all 3 were set aside as damaged, in .keepstep/damaged" in done.stderr
        assert "# .keepstep/damaged/checkpoint_2" in done.stdout
    assert verify(store, "2").exit_code == 2
    told = verify(store, "--json")
    assert told.exit_code == 1
    assert json.loads(told.stdout)["count"] == 0
    assert verify(store / ".keepstep" / "damaged" / "checkpoint_1").exit_code == 0


def test_a_file_that_checkpoints_share_is_read_once(store: Path) -> None:
    (store / "checkpoint_2" / "model.safetensors").unlink()
    os.link(store / "checkpoint_1" / "model.safetensors", store / "checkpoint_2" / "model.safetensors")
    alone = json.loads(verify(store, "2", "--json").stdout)["checkpoints"][0]["bytes_read"]
    found = json.loads(verify(store, "--json").stdout)["checkpoints"]
    size = (store / "checkpoint_1" / "model.safetensors").stat().st_size
    assert [one["bytes_read"] for one in found] == [alone, alone, alone - size]
    flip(store / "checkpoint_1" / "model.safetensors", -1)
    assert [one["sound"] for one in json.loads(verify(store, "--json").stdout)["checkpoints"]] == [
        True,
        False,
        False,
    ]


def test_json(store: Path) -> None:
    flip(store / "checkpoint_1" / "model.safetensors", -1)
    done = verify(store, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert sorted(found) == ["checkpoints", "count", "damaged", "leftovers", "path", "quick", "unreadable"]
    assert (found["count"], found["damaged"], found["quick"]) == (3, 1, False)
    assert found["checkpoints"][0] == {
        "name": "checkpoint_0",
        "path": str(store / "checkpoint_0"),
        "sound": True,
        "refused": False,
        "problems": [],
        "bytes_read": 9851,
    }
    assert found["checkpoints"][1]["sound"] is False
    assert len(found["checkpoints"][1]["problems"]) == 1


def test_what_is_pruned_meanwhile_is_no_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prune_first(directory: Path, **_: object) -> Report:
        if directory.name == "checkpoint_0":
            shutil.rmtree(directory)
            return Report(path=directory, problems=("manifest.json is missing",), bytes=0)
        return Report(path=directory, problems=(), bytes=0)

    monkeypatch.setattr("keepstep.cli.verify.verify_checkpoint", prune_first)
    done = verify(store, "--quick")
    assert done.exit_code == 0
    assert "checkpoint_0" not in done.stdout


def test_a_terminal_gets_a_bar_and_whole_lines(store: Path) -> None:
    flip(store / "checkpoint_1" / "model.safetensors", -1)
    text = on_terminal("verify", store, width=60)
    assert "━" in text
    lines = [without_styles(line.split("\x1b[2K")[-1]).rstrip() for line in text.splitlines()]
    assert "checkpoint_0  ok" in lines
    assert "checkpoint_1  damaged" in lines
    assert "    tensor 'model/half' in model.safetensors was changed:" in lines
    assert any(line.startswith("2 checkpoints sound · 1 damaged · ") for line in lines)


def test_nothing_but_json_on_standard_output(store: Path) -> None:
    done = run("verify", store, "--json")
    assert json.loads(done.stdout)["damaged"] == 0
    assert done.stderr == ""
