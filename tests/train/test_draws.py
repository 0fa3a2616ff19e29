"""What a resumed script draws from the global generators where the run that goes on draws nothing."""

# ruff: noqa: NPY002 - NumPy's global generator is one of those that a script draws from
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import Noisy, Tape, attempt, outcome
from torch.utils.data import DataLoader

from keepstep import Accelerator

TOLD = {"after resume()": ["epoch 0", "epoch 1", "epoch 1"], "at the top of an epoch": ["loader 0"] * 2}


@pytest.mark.parametrize("where", ["nowhere", "before resume()", "of its own", *TOLD])
def test_what_is_drawn_too_early_is_told(
    where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = np.random.default_rng(0)

    def script(accelerator: Accelerator, tape: Tape) -> dict[str, Any]:
        model = torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Dropout(0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Noisy(), 4, shuffle=True))
        if where == "before resume()":
            torch.rand(1)
        tape.resume()
        if where == "after resume()":
            random.random()
            np.random.rand()
        for epoch in accelerator.epochs(3):
            if where == "at the top of an epoch":
                np.random.rand()
                random.random()
            elif where == "of its own":
                own.random()
            for inputs, indices in loader:
                accelerator.backward(model(inputs).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
                tape.note(epoch, indices.tolist())
            tape.note("epilogue", epoch)
        return outcome(model, optimizer)

    for stop in (4, 3, 3, None):  # in the first epoch; in its epilogue; in the second one
        attempt(script, tmp_path, stop)
    told = [message for message in caplog.messages if "has drawn at random" in message]
    expected = TOLD.get(where, [])
    assert len(told) == len(expected)
    for message, place in zip(told, expected, strict=True):
        assert "(from numpy and python)" in message
        assert f"restored, before {place} " in message
