"""A loop over epochs that is left early: for now, or for good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.train.runs import Noisy
from torch.utils.data import DataLoader

from keepstep import Accelerator, CheckpointPolicy, Store
from keepstep.errors import UsageError


class Script:
    """A script with early stopping; each call is a process."""

    def __init__(self, project: Path) -> None:
        self.project = project

    def __call__(
        self, *, epochs: int = 5, stop_after: int | None = None, finished: bool = True, save: bool = False
    ) -> list[int]:
        accelerator = Accelerator(cpu=True, project_dir=self.project)
        model = torch.nn.Linear(4, 1)
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(Noisy(8), 4)
        )
        accelerator.resume()
        done = []
        for epoch in accelerator.epochs(epochs):
            for inputs, _ in loader:
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
            done.append(epoch)
            if epoch == stop_after:
                break
        if save:
            accelerator.save_state()
        accelerator.end_training(finished=finished)
        return done


def test_a_run_that_stopped_early_for_good_does_nothing_when_started_again(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script(stop_after=2) == [0, 1, 2]
    assert script(stop_after=2) == []
    assert script(stop_after=None) == []
    assert script(epochs=50) == []
    assert len(Store(tmp_path / "checkpoints").list()) == 1, "nothing new, nothing saved"


def test_a_loop_left_for_now_is_gone_on_with(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script(stop_after=1, finished=False, save=True) == [0, 1]
    assert script(stop_after=3) == [2, 3]
    assert script() == []


def test_a_run_with_all_its_epochs_goes_on_when_more_are_asked_for(tmp_path: Path) -> None:
    script = Script(tmp_path)
    assert script(epochs=2, save=True) == [0, 1]
    assert script(epochs=2) == []
    assert script(epochs=3, save=True) == [2]
    assert script(epochs=4, stop_after=3) == [3], "its last epoch, and left by break all the same"
    assert script(epochs=6) == []


def test_an_older_checkpoint_trains_on(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script(stop_after=1, finished=False, save=True)
    script(stop_after=2)
    store = Store(tmp_path / "checkpoints")
    store.delete("checkpoint_1")
    assert script(epochs=3) == [2]


def test_later_loops_are_not_touched(tmp_path: Path) -> None:
    def process(last: int | None) -> list[tuple[int, int]]:
        accelerator = Accelerator(cpu=True, project_dir=tmp_path)
        accelerator.prepare(torch.nn.Linear(1, 1))
        accelerator.resume()
        done = []
        for number in range(3):
            for epoch in accelerator.epochs(3):
                done.append((number, epoch))
                if epoch == 1:
                    break
            if number == last:
                break
        accelerator.end_training(finished=True)
        return done

    assert process(1) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert process(None) == [(2, 0), (2, 1)], "a third loop was not begun, so it is not over"
    assert process(None) == []


def test_finishing_needs_a_place(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.end_training(finished=True)
    for _ in accelerator.epochs(2):
        break
    with pytest.raises(UsageError, match="project_dir"):
        accelerator.end_training(finished=True)


def test_a_run_whose_end_could_not_be_saved_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.prepare(torch.nn.Linear(1, 1))
    for _ in accelerator.epochs(2):
        break

    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "the disk is on fire")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", refuse)
        with pytest.raises(OSError, match="on fire"):
            accelerator.end_training(finished=True)
    accelerator.end_training(finished=True)
    other = Accelerator(cpu=True, project_dir=tmp_path)
    other.prepare(torch.nn.Linear(1, 1))
    other.resume()
    assert list(other.epochs(2)) == []


def test_the_last_steps_of_a_finished_run_are_saved_once(tmp_path: Path) -> None:
    for attempt in range(3):
        accelerator = Accelerator(
            cpu=True, project_dir=tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=4)
        )
        model = torch.nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.resume()
        for _ in accelerator.epochs(1):
            for _ in range(6):
                accelerator.backward(model(torch.ones(1, 2)).sum())
                optimizer.step()
                optimizer.zero_grad()
                loss = torch.tensor(float(accelerator.step))
                accelerator.checkpoint(metrics={"loss": loss})
                loss.zero_()  # as of a running sum
        accelerator.end_training(finished=True)
        kept = Store(tmp_path / "checkpoints").list()
        assert [checkpoint.step for checkpoint in kept] == [4, 6], f"attempt {attempt}"
        assert [checkpoint.metrics for checkpoint in kept] == [{"loss": 4}, {"loss": 6}]


def test_metrics_of_an_earlier_step_are_not_those_of_the_last(tmp_path: Path) -> None:
    accelerator = Accelerator(
        cpu=True, project_dir=tmp_path, checkpoint_policy=CheckpointPolicy(every_n_steps=4)
    )
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(2):
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        if step == 0:
            accelerator.checkpoint(metrics={"loss": 1.0})
    accelerator.end_training(finished=True)
    assert [(one.step, one.metrics) for one in Store(tmp_path / "checkpoints").list()] == [(2, {})]
