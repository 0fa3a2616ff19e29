"""A run that goes back in the middle of its script: its loops, and where it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import Noisy, assert_same
from torch.utils.data import DataLoader, IterableDataset

from keepstep import Accelerator, Store
from keepstep.errors import UsageError


class Stream(IterableDataset[Any]):
    """Counts on from pass to pass, and can say where it is."""

    at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        for at in range(self.at + 1, self.at // 24 * 24 + 25):
            self.at = at
            yield torch.full((4,), float(self.at)) / 10, self.at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def samples(kind: str) -> DataLoader[Any]:
    if kind == "stream":
        return DataLoader(Stream(), 4)
    workers = 1 if kind == "workers" else 0
    return DataLoader(Noisy(24), 4, shuffle=True, num_workers=workers)


class Script:
    """Trains, and diverges once: each call of `run` is what a script does from its first loop on."""

    def __init__(self, project: Path, kind: str = "map") -> None:
        torch.manual_seed(3)
        self.project = project
        self.accelerator = Accelerator(cpu=True, project_dir=project)
        model = torch.nn.Linear(4, 1)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.01), samples(kind)
        )
        self.done: list[Any] = []

    def place(self, number: int) -> Path:
        return self.project / "checkpoints" / f"checkpoint_{number}"

    def step(self, epoch: int, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        inputs, indices = batch
        loss = self.model(inputs).pow(2).mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        at_end = self.accelerator.gradient_state.end_of_dataloader
        self.done.append((epoch, indices.tolist(), loss.item(), at_end))

    def run(self, *, saves_at: int = 0, leaves_at: int = 0, epochs: int = 3) -> None:
        for epoch in self.accelerator.epochs(epochs):
            for batch in self.loader:
                self.step(epoch, batch)
                if self.accelerator.step == saves_at:
                    self.accelerator.save_state()
                if self.accelerator.step == leaves_at:
                    return

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


@pytest.mark.parametrize("kind", ["map", "workers", "stream"])
@pytest.mark.parametrize("diverges_at", [5, 9, 16])
def test_loops_begun_anew_go_on_where_the_run_went_back_to(
    tmp_path: Path, kind: str, diverges_at: int
) -> None:
    whole = Script(tmp_path / "whole", kind)
    whole.run()

    script = Script(tmp_path / "run", kind)
    script.run(saves_at=3, leaves_at=diverges_at)
    script.accelerator.load_state(script.place(0))
    assert whole.done[:diverges_at] == script.done
    del script.done[3:]
    script.run(saves_at=8, leaves_at=10)

    other = Script(tmp_path / "run", kind)
    other.accelerator.resume()
    assert other.accelerator.step == 8
    other.run()
    assert script.done[:8] + other.done == whole.done
    assert_same(other.weights(), whole.weights())


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_a_loop_that_goes_on_after_going_back_is_refused(tmp_path: Path, kind: str) -> None:
    whole = Script(tmp_path / "whole", kind)
    whole.run()

    script = Script(tmp_path / "run", kind)

    def goes_on(back_after: int) -> None:
        for epoch in script.accelerator.epochs(3):
            for number, batch in enumerate(script.loader, 1):
                script.step(epoch, batch)
                if (script.accelerator.step, back_after) == (2, 4):
                    script.accelerator.save_state()
                if number == back_after:
                    script.accelerator.load_state(script.place(0))
            if not back_after:
                script.accelerator.load_state(script.place(0))

    with pytest.raises(UsageError, match="begin them anew"):
        goes_on(4)
    with pytest.raises(UsageError, match="a loop over epochs goes on"):
        goes_on(0)
    del script.done[2:]
    script.run()
    assert script.done == whole.done
    assert_same(script.weights(), whole.weights())


def test_going_back_in_the_second_loop_goes_on_in_it(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(epochs=1)
    script.run(saves_at=9, leaves_at=11, epochs=2)
    assert [epoch for epoch, *_ in script.done] == [0] * 6 + [0] * 5
    script.accelerator.load_state(script.place(0))
    script.run(epochs=2)
    assert [epoch for epoch, *_ in script.done[11:]] == [0] * 3 + [1] * 6
    script.run(epochs=1)
    assert len(script.done) == 11 + 9 + 6, "a third loop begins at its first epoch"

    script.accelerator.load_state(script.place(0))
    script.accelerator.load_state(script.place(0))
    script.run(leaves_at=10, epochs=2)
    script.accelerator.resume()
    script.run(epochs=1)
    script.run(epochs=2)
    assert script.accelerator.step == 18, "resume() is for a script that begins at its top"


def test_a_shorter_loop_than_the_one_gone_back_to_is_refused(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(saves_at=17)
    script.accelerator.load_state(script.place(0))
    with pytest.raises(UsageError, match=r"epoch 2 .* epochs\(1\)"):
        script.run(epochs=1)


def test_a_script_that_never_comes_to_its_loop_does_not_end_well(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(epochs=1)
    script.run(saves_at=8, leaves_at=8, epochs=2)
    other = Script(tmp_path)
    other.accelerator.resume()
    other.accelerator.end_training()
    other.run()
    assert not other.done
    with pytest.raises(UsageError, match=r"loop 1 .* after 1 of them"):
        other.accelerator.end_training(finished=True)
    assert len(Store(tmp_path / "checkpoints").list()) == 1


def test_a_script_that_ends_with_a_state_of_an_earlier_loop_ends_well(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(epochs=1)
    script.run(saves_at=8, leaves_at=10, epochs=2)
    script.accelerator.load_state(script.place(0))
    script.accelerator.end_training(finished=True)
    assert script.accelerator.step == 8


def test_a_script_that_fails_before_its_loop_is_not_accused_of_leaving_it_out(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(epochs=1)
    script.run(saves_at=8, leaves_at=8, epochs=2)
    other = Script(tmp_path)
    other.accelerator.resume()
    other.run()
    try:
        raise ValueError
    except ValueError:
        other.accelerator.end_training()


def test_a_loop_within_a_loop_is_refused_once_the_outer_one_goes_on(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    outer = accelerator.epochs(3)
    next(outer)
    assert list(accelerator.epochs(2)) == [0, 1]
    with pytest.raises(UsageError, match="inside another one"):
        next(outer)
    held = accelerator.epochs(5)
    next(held)
    assert list(accelerator.epochs(2)) == [0, 1], "the first one was left, and something holds it"


def test_what_memory_was_too_short_for_leaves_nothing_behind(tmp_path: Path) -> None:
    def process(fits: bool, leaves_at: int) -> list[Any]:
        script = Script(tmp_path)
        if not fits:
            try:
                script.run(leaves_at=0, epochs=1)
                raise MemoryError
            except MemoryError:
                script.accelerator.free_memory()
            torch.manual_seed(3)
            model = torch.nn.Linear(4, 1)
            script.model, script.optimizer, script.loader = script.accelerator.prepare(
                model, torch.optim.AdamW(model.parameters(), lr=0.01), samples("map")
            )
            script.done.clear()
            assert script.accelerator.epoch is None
            assert script.accelerator._saver.unsaved_steps == 0
        script.accelerator.resume()
        script.run(saves_at=4, leaves_at=leaves_at, epochs=2)
        return script.done

    whole = process(True, 0)
    for checkpoint in Store(tmp_path / "checkpoints").list():
        Store(tmp_path / "checkpoints").delete(checkpoint.name)
    assert process(False, 5) == whole[:5]
    assert process(True, 0) == whole[4:]


def test_memory_may_be_freed_inside_of_a_loop(tmp_path: Path) -> None:
    script = Script(tmp_path)
    epochs = 0
    for _ in script.accelerator.epochs(2):
        for _ in script.loader:
            script.accelerator.free_memory()
        epochs += 1
    assert epochs == 2


class Stopping:
    """Training that ends with its best state; each call is a process."""

    def __init__(self, project: Path, *, by_break: bool) -> None:
        self.project = project
        self.by_break = by_break

    def __call__(self, *, killed: bool = False) -> tuple[int, dict[str, torch.Tensor]]:
        script = Script(self.project)
        script.accelerator.resume()
        script.run(saves_at=7, leaves_at=10 if self.by_break else 0)
        if killed:
            script.accelerator.save_state()
            return len(script.done), {}
        script.accelerator.load_state(script.place(0))
        script.accelerator.end_training(finished=True)
        return len(script.done), script.weights()


@pytest.mark.parametrize("by_break", [True, False])
def test_a_run_that_is_finished_with_its_best_state_stays_so(tmp_path: Path, by_break: bool) -> None:
    process = Stopping(tmp_path, by_break=by_break)
    done, best = process()
    assert done == (10 if by_break else 18)
    saved = Store(tmp_path / "checkpoints").list()
    assert [checkpoint.step for checkpoint in saved] == [7, 7]
    assert process()[0] == 0
    script = Script(tmp_path)
    script.accelerator.resume()
    assert_same(script.weights(), best)
    assert len(Store(tmp_path / "checkpoints").list()) == 2, "nothing new, nothing saved"


def test_a_run_that_is_killed_before_it_took_its_best_state_takes_it_when_started_again(
    tmp_path: Path,
) -> None:
    process = Stopping(tmp_path, by_break=False)
    assert process(killed=True)[0] == 18
    assert process()[0] == 0
    done, best = process()
    assert done == 0
    saved = Store(tmp_path / "checkpoints").list()
    assert [checkpoint.step for checkpoint in saved] == [7, 18, 7]
    script = Script(tmp_path)
    script.accelerator.resume()
    assert_same(script.weights(), best)


def test_all_loops_of_a_run_that_ends_with_a_state_of_the_first_are_over(tmp_path: Path) -> None:
    def process(loops: int) -> int:
        script = Script(tmp_path)
        script.accelerator.resume()
        script.run(saves_at=5, epochs=1)
        for _ in range(1, loops):
            script.run(epochs=1)
        script.accelerator.load_state(script.place(0))
        script.accelerator.end_training(finished=True)
        return len(script.done)

    assert process(2) == 12
    assert process(2) == 0


def test_a_best_state_that_is_taken_after_the_end_is_the_newest(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.run(saves_at=4, leaves_at=8)
    script.accelerator.end_training(finished=True)
    script.accelerator.load_state(script.place(0))
    script.accelerator.end_training(finished=True)
    other = Script(tmp_path)
    other.accelerator.resume()
    assert other.accelerator.step == 4
    other.run()
    assert not other.done


def test_a_run_that_freed_its_memory_in_its_loop_can_be_finished(tmp_path: Path) -> None:
    script = Script(tmp_path)
    for epoch in script.accelerator.epochs(3):
        if epoch == 0:
            script.accelerator.free_memory()
            script.model, script.optimizer, script.loader = script.accelerator.prepare(
                script.model, script.optimizer.optimizer, samples("map")
            )
        for batch in script.loader:
            script.step(0, batch)
        if len(script.done) == 12:
            break
    script.accelerator.end_training(finished=True)
    other = Script(tmp_path)
    other.accelerator.resume()
    other.run()
    assert not other.done


def test_going_back_needs_no_place_to_end_in(tmp_path: Path) -> None:
    script = Script(tmp_path)
    script.accelerator = Accelerator(cpu=True)
    script.model, script.optimizer, script.loader = script.accelerator.prepare(
        script.model, script.optimizer, script.loader
    )
    script.accelerator.save_state(tmp_path / "best")
    script.run(epochs=1)
    script.accelerator.load_state(tmp_path / "best")
    script.accelerator.end_training(finished=True)


def test_a_run_without_epochs_is_finished_with_the_state_that_it_went_back_to(tmp_path: Path) -> None:
    script = Script(tmp_path)
    for _ in range(2):
        for batch in script.loader:
            script.step(0, batch)
            if script.accelerator.step in {4, 9}:
                script.accelerator.save_state()
            if script.accelerator.step == 9:
                break
    script.accelerator.load_state(script.place(0))
    best = script.weights()
    script.accelerator.end_training(finished=True)
    script.accelerator.end_training(finished=True)
    assert [checkpoint.step for checkpoint in Store(tmp_path / "checkpoints").list()] == [4, 9, 4]
    looking = Script(tmp_path)
    looking.accelerator.resume()
    assert_same(looking.weights(), best)
    looking.accelerator.load_state(script.place(1))
    looking.accelerator.end_training(finished=True)
    assert len(Store(tmp_path / "checkpoints").list()) == 3, "a look at a checkpoint is no training"
