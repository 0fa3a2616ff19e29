"""Loops that are left: a checkpoint in an exception's handler is one in the middle of the epoch."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import (
    CountingSampler,
    Interrupted,
    Noisy,
    Tape,
    assert_same,
    attempt,
    outcome,
    small_model,
)
from torch.utils.data import DataLoader

from keepstep import Accelerator


def test_a_checkpoint_in_the_handler_of_an_exception_goes_on_in_the_epoch(tmp_path: Path) -> None:
    stop_at: int | None = None

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train, held_out = DataLoader(Noisy(), 4, shuffle=True), DataLoader(Noisy(9), 4, shuffle=True)
        model, optimizer, train, held_out = accelerator.prepare(model, optimizer, train, held_out)
        tape.resume()
        try:
            for epoch in accelerator.epochs(2):
                for inputs, indices in train:
                    accelerator.backward(model(inputs).pow(2).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                    for _ in held_out:
                        break
                    tape.note(epoch, indices.tolist())
                    if accelerator.step == stop_at:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            accelerator.save_state()
            raise Interrupted from None
        return outcome(model, optimizer)

    whole, entries = attempt(script, tmp_path / "whole")
    for stop_at in (1, 4, 8):
        project = tmp_path / f"stopped_{stop_at}"
        nothing, before = attempt(script, project)
        assert nothing is None
        stop_at = None
        result, after = attempt(script, project)
        assert before + after == entries
        assert_same(result, whole)


def test_an_interrupt_while_the_next_batch_is_loaded_ends_no_pass(tmp_path: Path) -> None:
    class Interrupting(Noisy):
        """Is interrupted once, as it is asked for a sample."""

        left: int | None = None

        def __getitem__(self, index: int) -> Any:
            if self.left is not None:
                Interrupting.left = self.left - 1
                if self.left < 0:
                    Interrupting.left = None
                    raise KeyboardInterrupt
            return super().__getitem__(index)

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        train = DataLoader(Interrupting(), 4, shuffle=True)
        model, optimizer, train = accelerator.prepare(model, optimizer, train)
        tape.resume()
        try:
            for epoch in accelerator.epochs(2):
                for inputs, indices in train:
                    accelerator.backward(model(inputs).pow(2).mean())
                    optimizer.step()
                    optimizer.zero_grad()
                    tape.note(epoch, indices.tolist())
        except KeyboardInterrupt:
            accelerator.save_state()
            raise Interrupted from None
        return outcome(model, optimizer)

    whole, entries = attempt(script, tmp_path / "whole")
    for left in (2, 13, 20, 30):
        Interrupting.left = left
        nothing, before = attempt(script, tmp_path / f"left_{left}")
        assert nothing is None
        result, after = attempt(script, tmp_path / f"left_{left}")
        assert before + after == entries
        assert_same(result, whole)


def test_a_batch_is_not_held_while_it_is_used(tmp_path: Path) -> None:
    loader = Accelerator(cpu=True, project_dir=tmp_path).prepare(DataLoader(range(12), 4))
    loader._placement = lambda batch: batch.clone()
    for batch in loader:
        alive = weakref.ref(batch)
        del batch
        assert alive() is None


def test_a_batch_that_could_not_be_placed_was_not_given(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    loader = accelerator.prepare(DataLoader(range(12), 4))
    batches = iter(loader)
    next(batches)

    def full(_: Any) -> Any:
        raise MemoryError

    again = iter(loader)
    loader._placement = full
    with pytest.raises(MemoryError):
        next(again)
    loader._placement = lambda batch: batch
    cursor = loader.cursor
    assert (cursor.pass_number, cursor.position) == (1, 0)


def test_a_sampler_that_counts_is_in_the_left_pass_again(tmp_path: Path) -> None:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        sampler = CountingSampler(12)
        loader = accelerator.prepare(DataLoader(Noisy(12), 4, sampler=sampler))
        tape.resume()
        try:
            for _ in accelerator.epochs(2):
                for _, indices in loader:
                    tape.note(indices.tolist())
                    if stop_at == tape.noted:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            accelerator.save_state()
            raise Interrupted from None
        return {"times": sampler.times}

    stop_at: int | None = None
    whole, entries = attempt(script, tmp_path / "whole")
    for number in (1, 4):
        stop_at = number
        _, before = attempt(script, tmp_path / f"stopped_{number}")
        stop_at = None
        result, after = attempt(script, tmp_path / f"stopped_{number}")
        assert before + after == entries
        assert result == whole


def test_a_break_inside_of_a_handler_is_a_break(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    loader = accelerator.prepare(DataLoader(Noisy(), 4))
    try:
        raise ValueError
    except ValueError:
        for _ in loader:
            break
        assert accelerator._state.progress.state_dict()["open"] == []
