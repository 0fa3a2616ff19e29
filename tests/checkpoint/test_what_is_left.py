"""What a message says of the disk after a refusal is so: a rest that could not be removed is not denied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep import Store
from keepstep.errors import StoreError
from keepstep.files import LocalFiles

STATE = {"model": torch.ones(64)}


def fails(*_: Any, **__: Any) -> None:
    raise OSError(5, "Input/output error")


def names(root: Path) -> list[str]:
    return [checkpoint.name for checkpoint in Store(root).list()]


def told(caught: pytest.ExceptionInfo[StoreError]) -> str:
    message = str(caught.value)
    assert message.endswith(". Other checkpoints are whole")
    return message


def test_a_deletion_that_stops_half_way_leaves_a_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.save(STATE)
    store.save(STATE)
    monkeypatch.setattr(LocalFiles, "remove_file", fails)
    with pytest.raises(StoreError) as caught:
        store.delete("checkpoint_0")
    assert "left" not in told(caught)
    assert [path.name.partition(".")[0] for path in (tmp_path / ".keepstep" / "trash").iterdir()] == [
        "checkpoint_0"
    ]
    assert names(tmp_path) == ["checkpoint_1"]


def test_a_directory_that_could_not_be_removed_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    store.save(STATE)
    monkeypatch.setattr(LocalFiles, "sync", fails)
    monkeypatch.setattr(LocalFiles, "remove_tree", fails)
    with pytest.raises(StoreError) as caught:
        store.save(STATE)
    assert "left" not in told(caught)
    assert "could not remove the unfinished" in caplog.text
    assert len(list(tmp_path.glob("*.tmp-*"))) == 1


def test_a_checkpoint_that_was_published_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.save(STATE)
    rename = LocalFiles.rename

    def rename_and_break(files: LocalFiles, source: Path, target: Path) -> None:
        rename(files, source, target)
        monkeypatch.setattr(LocalFiles, "sync_directory", fails)

    monkeypatch.setattr(LocalFiles, "rename", rename_and_break)
    with pytest.raises(StoreError) as caught:
        store.save(STATE)
    assert "left" not in told(caught)
    assert names(tmp_path) == ["checkpoint_0", "checkpoint_1"]
