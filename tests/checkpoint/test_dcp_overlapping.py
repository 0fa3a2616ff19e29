"""Saves of one StorageWriter that overlap: one is refused, and the other is whole."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.api import CheckpointException

import keepstep
from keepstep import Checkpoint
from keepstep.checkpoint.saving.staging import TensorBytes


@pytest.mark.timeout(60)
def test_a_save_begun_amid_another_one_of_its_writer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    copy_into = TensorBytes.copy_into

    def held(source: TensorBytes, *where: Any) -> None:
        begun.set()
        assert go_on.wait(30)
        copy_into(source, *where)

    monkeypatch.setattr(TensorBytes, "copy_into", held)
    writer = keepstep.dcp.StorageWriter(tmp_path / "step", step=1)
    errors: list[Exception] = []

    def save() -> None:
        try:
            torch_dcp.save({"w": torch.ones(1000)}, storage_writer=writer, no_dist=True)
        except Exception as error:  # noqa: BLE001  (asserted below)
            errors.append(error)

    first = threading.Thread(target=save)
    first.start()
    assert begun.wait(30)
    with pytest.raises((keepstep.errors.UsageError, CheckpointException), match="still saving"):
        torch_dcp.save({"w": torch.zeros(1000)}, storage_writer=writer, no_dist=True)
    go_on.set()
    first.join(30)
    assert not errors
    assert Checkpoint.open(tmp_path / "step").load()["w"].sum() == 1000
