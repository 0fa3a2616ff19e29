"""A run that goes back to an older checkpoint in the same process: what is safe then, and what comes next."""

from __future__ import annotations

import contextlib
import logging
import threading
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.holding import Held

from keepstep import Accelerator, Checkpoint, CheckpointPolicy, Store
from keepstep.checkpoint.pending import PendingSave
from keepstep.errors import BackgroundSaveError
from keepstep.train.pace.pacing import Pacer


class Run:
    """A small prepared run that saves every ten steps."""

    def __init__(self, project: Path, **policy: Any) -> None:
        torch.manual_seed(1)
        self.project = project
        self.accelerator = Accelerator(
            cpu=True, project_dir=project, checkpoint_policy=CheckpointPolicy(every_n_steps=10, **policy)
        )
        model = torch.nn.Linear(4, 1)
        self.model, self.optimizer = self.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.1)
        )

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.accelerator.backward(self.model(torch.ones(2, 4)).pow(2).sum())
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.accelerator.checkpoint(metrics={"loss": float(self.unsaved)})

    @property
    def unsaved(self) -> int:
        return self.accelerator._saver.unsaved_steps

    def place(self, number: int) -> Path:
        return self.project / "checkpoints" / f"checkpoint_{number}"

    @property
    def saved(self) -> list[Checkpoint]:
        return Store(self.project / "checkpoints").list()


@pytest.mark.parametrize("waits", [True, False], ids=["after a wait", "while it is being written"])
def test_steps_after_a_rollback_are_not_taken_for_saved(
    tmp_path: Path, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path)
    run.train(20)
    if waits:
        run.accelerator.wait_for_checkpoint()
    run.accelerator.load_state(run.place(0))
    assert run.unsaved == 0
    run.train(6)
    assert run.unsaved == 6
    with caplog.at_level(logging.WARNING):
        run.accelerator.end_training()
    assert "ends 6 optimizer steps after its last checkpoint" in caplog.text
    run.accelerator.end_training(finished=True)
    assert [checkpoint.step for checkpoint in run.saved] == [10, 20, 16]
    assert run.accelerator.checkpoint_counts.saved == 3
    assert run.unsaved == 0


def test_one_can_go_back_again_and_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(20)
    for _ in range(2):
        run.accelerator.load_state(run.place(0))
        run.train(12)
        assert run.unsaved == 2
    run.accelerator.end_training(finished=True)
    assert [checkpoint.step for checkpoint in run.saved] == [10, 20, 20, 20, 22]
    run = Run(tmp_path)
    loaded = run.accelerator.resume()
    assert loaded is not None
    assert (loaded.name, loaded.step, run.unsaved) == ("checkpoint_4", 22, 0)


def test_the_next_checkpoint_names_the_one_that_was_gone_back_to_as_its_parent(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(20)
    run.accelerator.wait_for_checkpoint()
    run.accelerator.load_state(run.place(0))
    run.train(10)
    run.accelerator.end_training()
    ids = {checkpoint.manifest.id: checkpoint.name for checkpoint in run.saved}
    parents = [ids.get(checkpoint.manifest.parent or "") for checkpoint in run.saved]
    assert parents == [None, "checkpoint_0", "checkpoint_0"]
    assert [checkpoint.manifest.attempt for checkpoint in run.saved] == [1, 1, 1]


def test_one_can_go_back_to_the_checkpoint_that_is_being_written(tmp_path: Path, held: Held) -> None:
    run = Run(tmp_path, staging="overlapped")
    run.train(9)
    held.opened.clear()
    run.train(1)
    threading.Timer(0.1, held.opened.set).start()
    run.accelerator.load_state(run.place(0))
    assert (run.accelerator.step, run.unsaved, run.accelerator.checkpoint_counts.saved) == (10, 0, 1)


def test_a_directory_elsewhere_saves_no_steps_that_were_given_up(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.train(17)
    run.accelerator.save_state(tmp_path / "elsewhere")
    assert run.unsaved == 0
    run.accelerator.load_state(run.place(0))
    run.train(5)
    assert run.unsaved == 5


def test_what_was_said_of_a_step_that_was_given_up_is_not_said_of_the_same_step_later(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(15)
    run.accelerator.wait_for_checkpoint()
    run.accelerator.load_state(run.place(0))
    for _ in range(5):
        run.model(torch.ones(2, 4)).pow(2).sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.accelerator.end_training(finished=True)
    assert (run.saved[-1].step, dict(run.saved[-1].metrics)) == (15, {})


def test_a_save_still_under_way_makes_no_later_step_safe() -> None:
    class Writing:
        """A save that ends when the test says so."""

        blocked_s = 0.1
        failed = False
        over = False

        def done(self) -> bool:
            return self.over

    pacer = Pacer(CheckpointPolicy(every_n_steps=10), waited_s=lambda: 0.0, clock=lambda: 0.0)
    pending = Writing()
    pacer.began(20, 0.0, cast(PendingSave, pending), behind=False)
    assert pacer.safe_step == 20
    pacer.safe_up_to(10)
    assert pacer.safe_step == 10
    pending.over = True
    assert (pacer.safe_step, pacer.counts.saved) == (10, 1)


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_save_that_failed_keeps_from_going_back_only_if_the_policy_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    run = Run(tmp_path, on_error=on_error)
    run.train(10)
    run.accelerator.wait_for_checkpoint()
    store = run.accelerator._saver._store
    assert store is not None

    def fail(*_: Any) -> None:
        raise OSError(5, "the disk is on fire")

    with monkeypatch.context() as patched:
        patched.setattr(store._saves, "_committed", fail)
        run.train(10)
        with pytest.raises(BackgroundSaveError) if on_error == "raise" else contextlib.nullcontext():
            run.accelerator.load_state(run.place(0))
    assert ("the disk is on fire" in caplog.text) == (on_error == "warn")
    run.accelerator.load_state(run.place(0))
    assert (run.accelerator.step, run.unsaved, run.accelerator.checkpoint_counts.failed) == (10, 0, 1)
