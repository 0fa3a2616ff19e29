"""Two optimizers that take turns, each of whose losses leaves gradients on the other's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import Noisy, Tape, assert_exact, outcome
from torch.utils.data import DataLoader

from keepstep import Accelerator


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_they_clip_their_own_gradients_and_are_saved_after_each_turn(precision: str, tmp_path: Path) -> None:
    def make(project: Path) -> Accelerator:
        return Accelerator(cpu=True, project_dir=project, mixed_precision=precision)

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        maker, critic = (
            torch.nn.Linear(4, 4),
            torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(4, 1)),
        )
        for_maker = torch.optim.Adam(maker.parameters(), lr=1e-2)
        for_critic = torch.optim.Adam(critic.parameters(), lr=1e-2)
        maker, critic, for_maker, for_critic, loader = accelerator.prepare(
            maker, critic, for_maker, for_critic, DataLoader(Noisy(), 4, shuffle=True)
        )
        tape.resume()
        for _ in accelerator.epochs(2):
            for inputs, indices in loader:
                for_critic.zero_grad()
                accelerator.backward(critic(maker(inputs)).mean() - critic(inputs).mean())
                accelerator.clip_grad_norm_(critic.parameters(), 0.5)
                for_critic.step()
                tape.note("critic", indices.tolist())
                for_maker.zero_grad()
                accelerator.backward(-critic(maker(inputs)).mean())
                accelerator.clip_grad_value_(maker.parameters(), 0.1)
                for_maker.step()
                tape.note("maker", indices.tolist())
        return {"maker": outcome(maker, for_maker), "critic": outcome(critic, for_critic)}

    # Saved at the end of an iteration: an epoch's pass goes on with the next batch.
    assert_exact(script, tmp_path, make=make, stops=range(2, 20, 6))
