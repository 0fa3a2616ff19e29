"""What a resumed run says about options that were changed in the script."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from keepstep import Accelerator
from keepstep.errors import MismatchError


def start(project: Path, make_scheduler: Any = None, **options: Any) -> Accelerator:
    accelerator = Accelerator(cpu=True, project_dir=project)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    accelerator.prepare(model, optimizer)
    if make_scheduler is not None:
        accelerator.prepare(make_scheduler(optimizer))
    accelerator.resume()
    return accelerator


def test_a_changed_learning_rate_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, lr=0.1).save_state()
    assert not caplog.records
    start(tmp_path, lr=0.5)
    assert "lr of SGD 0, group 0 is 0.1, not 0.5" in caplog.text


def test_a_run_says_where_it_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "keepstep")
    first = start(tmp_path, lr=0.1)
    assert "holds no checkpoint yet: the run begins from the start" in caplog.text
    first.save_state()
    start(tmp_path, lr=0.1)
    assert f"going on after {tmp_path / 'checkpoints' / 'checkpoint_0'}: step 0" in caplog.text


def test_a_learning_rate_that_a_scheduler_moved_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def one_cycle(optimizer: Any) -> Any:
        return lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=10)

    accelerator = start(tmp_path, one_cycle, lr=0.1, momentum=0.9)
    for _ in range(3):
        accelerator._state.optimizers[0].step()
        accelerator._state.schedulers[0].step()
    accelerator.save_state()
    start(tmp_path, one_cycle, lr=0.1, momentum=0.9)
    assert not caplog.records


def test_a_changed_scheduler_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start(tmp_path, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10), lr=0.1).save_state()
    start(tmp_path, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20), lr=0.1)
    assert "T_max of CosineAnnealingLR 0 is 10, not 20" in caplog.text


def test_another_kind_of_scheduler_is_refused(tmp_path: Path) -> None:
    start(tmp_path, lambda optimizer: lr_scheduler.StepLR(optimizer, 2), lr=0.1).save_state()
    with pytest.raises(MismatchError, match="scheduler 0 was StepLR and is CosineAnnealingLR now"):
        start(tmp_path, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10), lr=0.1)
