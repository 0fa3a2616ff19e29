"""Epochs whose batches come from no prepared loader, with an evaluation over a prepared one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from keepstep import Accelerator


@pytest.mark.parametrize("own_backward", [False, True])
def test_an_epoch_that_was_trained_by_hand_is_not_trained_again(tmp_path: Path, own_backward: bool) -> None:
    assert _run(tmp_path, own_backward, stop_after=1) == [0, 1]
    assert _run(tmp_path, own_backward, stop_after=9) == [2, 3]


def _run(place: Path, own_backward: bool, *, stop_after: int) -> list[int]:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, project_dir=place)
    model = nn.Linear(3, 1)
    loader = torch.utils.data.DataLoader(torch.rand(8, 3), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    accelerator.resume()
    trained = []
    for epoch in accelerator.epochs(4):
        trained.append(epoch)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(torch.rand(2, 3)).mean()
            loss.backward() if own_backward else accelerator.backward(loss)
            optimizer.step()
        with torch.no_grad():
            assert len([model(batch) for batch in loader]) == 2
        accelerator.save_state()
        if epoch == stop_after:
            break
    return trained
