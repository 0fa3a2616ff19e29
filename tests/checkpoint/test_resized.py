"""Modules that resize their buffers when they are loaded, as observers of quantization do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same
from torch import nn
from torch.ao import quantization

from keepstep.checkpoint.store import Store
from keepstep.errors import RestoreError


class Quantized(nn.Module):
    """A layer trained for quantization, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.weight_quantizer = quantization.default_per_channel_weight_fake_quant()
        self.observer = quantization.HistogramObserver()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.weight_quantizer(self.layer.weight)
        return self.observer(nn.functional.linear(inputs, weight, self.layer.bias))


class Refuses(nn.Module):
    """Has loading code, and takes one shape only."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(size))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)


def test_observers_take_what_was_seen_before_they_have_seen_anything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = Quantized()
    for _ in range(2):
        saved(torch.randn(4, 3))
    Store(tmp_path).save({"model": saved})
    live = Quantized()
    shapes = [buffer.shape for buffer in live.buffers()]
    assert shapes != [buffer.shape for buffer in saved.buffers()]
    weight = live.layer.weight
    for _ in range(2):  # into new ones, and into those that have their size by now
        Store(tmp_path).load_latest_into({"model": live})
        assert_same(live.state_dict(), saved.state_dict())
    assert live.layer.weight is weight
    inputs = torch.randn(4, 3)
    assert torch.equal(live(inputs), saved(inputs))


def test_what_was_resized_comes_back_if_something_else_refuses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved = Quantized()
    saved(torch.randn(4, 3))
    Store(tmp_path).save({"a": saved, "b": Refuses(3)})
    live = Quantized()
    before = {name: value.clone() for name, value in live.state_dict().items()}
    with pytest.raises(RestoreError, match="size mismatch"):
        Store(tmp_path).load_latest_into({"a": live, "b": Refuses(2)})
    assert_same(dict(live.state_dict()), before)
