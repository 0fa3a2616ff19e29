"""Gradients that are there when a checkpoint is made, however they came and whether a step has used them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import Noisy, Script, Tape, assert_exact, outcome
from torch.utils.data import DataLoader

from keepstep import Accelerator


class Branches(torch.nn.Module):
    """Uses one half of its parameters in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.even = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, odd: bool) -> torch.Tensor:
        return (self.odd if odd else self.even)(inputs)


def script_with(micro_step: Callable[[Accelerator, Any, torch.Tensor, bool], None]) -> Script:
    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = Branches()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 4, shuffle=True))
        tape.resume()
        for _ in accelerator.epochs(2):
            for inputs, indices in loader:
                odd = bool(indices.sum() % 2)
                micro_step(accelerator, optimizer, model(inputs, odd).pow(2).mean(), odd)
                tape.note(indices.tolist())
        return outcome(model, optimizer)

    return script


def by_hand(_: Accelerator, optimizer: Any, loss: torch.Tensor, odd: bool) -> None:
    loss.backward()
    if odd:
        optimizer.step()
        optimizer.zero_grad()


def zeroed_and_not_dropped(accelerator: Accelerator, optimizer: Any, loss: torch.Tensor, _: bool) -> None:
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def zeroed_first(accelerator: Accelerator, optimizer: Any, loss: torch.Tensor, _: bool) -> None:
    optimizer.zero_grad(set_to_none=False)
    accelerator.backward(loss)
    optimizer.step()


def never_cleared(accelerator: Accelerator, optimizer: Any, loss: torch.Tensor, _: bool) -> None:
    accelerator.backward(loss)
    optimizer.step()


@pytest.mark.parametrize("micro_step", [by_hand, zeroed_and_not_dropped, zeroed_first, never_cleared])
def test_they_come_back(micro_step: Any, tmp_path: Path) -> None:
    assert_exact(script_with(micro_step), tmp_path, stops=range(1, 9, 2))


def test_those_that_a_step_used_take_no_space_once_the_script_is_known_to_clear_them() -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = []
    for _ in range(3):
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        kept.append(bool(accelerator._state.capture().own["gradients"]["of"]))
    assert kept == [True, False, False]
