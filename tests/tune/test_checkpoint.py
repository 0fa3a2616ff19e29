"""`tune.Checkpoint`: directories as Ray Tune hands them about, and states."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.place.deletion import delete_checkpoint
from keepstep.errors import (
    CheckpointBusyError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    UsageError,
)
from keepstep.files import LocalFiles
from keepstep.tune import Checkpoint
from keepstep.tune.saving import Saver


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "model.pt").write_bytes(b"weights")
    (tmp_path / "mine" / "deep" / "log").write_text("line")
    (tmp_path / "mine" / "empty").mkdir()
    return tmp_path / "mine"


@pytest.fixture
def reported(tmp_path: Path, mine: Path) -> Path:
    given = Checkpoint.from_directory(mine)
    given.set_metadata({"epoch": 3})
    name = Saver(str(tmp_path / "trial")).save(given, iteration=4, metrics={"eval": {"loss": 0.5}}).name
    return tmp_path / "trial" / name


def tree(root: str | Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*"))


WHOLE = ["deep", "deep/log", "empty", "model.pt"]


def test_a_directory_of_the_users_is_used_where_it_lies(mine: Path) -> None:
    checkpoint = Checkpoint.from_directory(str(mine))
    assert checkpoint
    assert checkpoint.filesystem is None
    assert checkpoint.address is None
    assert checkpoint.path == str(mine)
    assert checkpoint.metrics == {}
    assert repr(checkpoint) == f"Checkpoint(path={str(mine)!r})"
    with checkpoint.as_directory() as directory:
        assert directory == str(mine)


def test_what_was_reported_comes_back_as_the_directory_it_was(reported: Path) -> None:
    checkpoint = Checkpoint(reported)
    assert checkpoint.address == str(reported)
    assert checkpoint.path == str(reported / "files")
    assert checkpoint.metrics == {"eval/loss": 0.5}
    assert checkpoint == Checkpoint.from_directory(checkpoint.path)
    assert Checkpoint(checkpoint.path).address == str(reported)
    assert len({checkpoint, Checkpoint(checkpoint.path)}) == 1
    with checkpoint.as_directory() as directory:
        assert tree(directory) == WHOLE
        assert Path(directory, "model.pt").read_bytes() == b"weights"


def test_to_directory_copies(reported: Path, tmp_path: Path) -> None:
    target = tmp_path / "there"
    assert Checkpoint(reported).to_directory(target) == str(target)
    copied = Checkpoint(reported).to_directory()
    assert tree(target) == tree(copied) == WHOLE
    Path(copied, "model.pt").write_bytes(b"other")
    (target / "more").write_text("stays")
    Checkpoint(reported).to_directory(target)
    assert (target / "more").exists()
    with Checkpoint(reported).as_directory() as directory:
        assert Path(directory, "model.pt").read_bytes() == b"weights"
    shutil.rmtree(copied)


def test_metadata_is_written_down_with_the_report(reported: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(reported)
    assert checkpoint.get_metadata() == {"epoch": 3}
    checkpoint.update_metadata({"note": ["x"]})
    checkpoint.get_metadata()["note"].append("y")
    assert checkpoint.get_metadata() == {"epoch": 3, "note": ["x"]}
    assert Checkpoint(reported).get_metadata() == {"epoch": 3}, "a committed checkpoint never changes"
    saver = Saver(str(tmp_path / "trial"), next_checkpoint=1)
    saver.save(checkpoint, iteration=5, metrics={})
    assert Checkpoint(tmp_path / "trial" / "checkpoint_000001").get_metadata() == checkpoint.get_metadata()


def test_it_travels_to_other_processes(reported: Path) -> None:
    checkpoint = Checkpoint(reported)
    checkpoint.update_metadata({"k": 1})
    again = pickle.loads(pickle.dumps(checkpoint))
    assert again == checkpoint
    assert again.get_metadata() == {"epoch": 3, "k": 1}


def test_it_is_not_deleted_while_it_is_used(reported: Path) -> None:
    trash = reported.parent / ".keepstep" / "trash"
    with Checkpoint(reported).as_directory(), pytest.raises(CheckpointBusyError):
        delete_checkpoint(LocalFiles(), reported, trash)
    checkpoint = Checkpoint(reported)
    delete_checkpoint(LocalFiles(), reported, trash)
    with pytest.raises(CheckpointNotFoundError, match="does not exist"), checkpoint.as_directory():
        pass


def test_a_flipped_bit_is_found_before_it_is_loaded(reported: Path) -> None:
    (reported / "files" / "model.pt").write_bytes(b"Weights")
    checkpoint = Checkpoint(reported)
    with (
        pytest.raises(DamagedCheckpointError, match=r"files/model\.pt has the digest"),
        checkpoint.as_directory(),
    ):
        pass
    with pytest.raises(DamagedCheckpointError):
        checkpoint.to_directory()
    with checkpoint.as_directory(verify=False) as directory:
        assert tree(directory) == WHOLE
    manifest = reported / "manifest.json"
    manifest.write_text(manifest.read_text().replace("eval/loss", "eval/Loss"))
    with pytest.raises(DamagedCheckpointError, match=r"manifest\.json"), Checkpoint(reported).as_directory():
        pass


def test_there_must_be_a_directory(tmp_path: Path, mine: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, problem in (("gone", "does not exist"), ("file", "is a file")):
        with pytest.raises(CheckpointNotFoundError, match=f"{name} {problem}; a checkpoint is a directory"):
            Checkpoint.from_directory(tmp_path / name)
    checkpoint = Checkpoint.from_directory(mine)
    shutil.rmtree(mine)
    with pytest.raises(CheckpointNotFoundError, match="mine does not exist"), checkpoint.as_directory():
        pass
    with pytest.raises(UsageError, match="give the address instead"):
        Checkpoint(tmp_path, object())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="s3a://"):
        Checkpoint("ftp://host/checkpoint_1").get_metadata()


def test_somebody_elses_manifest_makes_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "manifest.json").write_text('{"name": "app"}')
    assert Checkpoint(tmp_path / "web").address is None
    (tmp_path / "web" / "files").mkdir()
    assert Checkpoint(tmp_path / "web" / "files").path == str(tmp_path / "web" / "files")


def test_a_state_is_loaded_through_keepstep(tmp_path: Path, mine: Path) -> None:
    saved = save_directory(tmp_path / "state", {"w": torch.arange(3), "n": 5}, metrics={"loss": 1.0})
    checkpoint = Checkpoint.from_directory(saved.path)
    assert checkpoint.metrics == {"loss": 1.0}
    assert checkpoint.load("n") == {"n": 5}
    live = {"w": torch.zeros(3, dtype=torch.int64), "n": 0}
    checkpoint.load_into(live)
    assert live["w"].tolist() == [0, 1, 2]
    with checkpoint.as_directory() as directory:
        assert directory == str(saved.path)
    copied = checkpoint.to_directory(tmp_path / "copy")
    assert Checkpoint(copied).load()["n"] == 5
    with pytest.raises(UsageError, match=r"holds no state; open its files with checkpoint\.as_directory"):
        Checkpoint(mine).load()


def test_directories_are_saved_and_read_without_torch(tmp_path: Path, mine: Path) -> None:
    code = """
import sys
from keepstep.tune import Checkpoint
from keepstep.tune.saving import Saver
Saver(sys.argv[1]).save(Checkpoint.from_directory(sys.argv[2]), iteration=1, metrics={})
with Checkpoint(sys.argv[1] + "/checkpoint_000000").as_directory() as directory:
    print(open(directory + "/model.pt").read(), *{"torch", "numpy", "safetensors"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "t"), str(mine)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["weights"]


def test_a_temporary_directory_may_go_once_it_is_saved(tmp_path: Path) -> None:
    saver = Saver(str(tmp_path / "trial"))
    for step in range(3):
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "step").write_text(str(step))
            saver.save(Checkpoint.from_directory(directory), iteration=step, metrics={})
    for step, saved in enumerate(sorted((tmp_path / "trial").glob("checkpoint_*"))):
        assert (saved / "files" / "step").read_text() == str(step)
