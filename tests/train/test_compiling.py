"""Models that torch compiles: what is prepared, saved and given back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from keepstep import Accelerator, Checkpoint
from keepstep.errors import UsageError
from keepstep.utils import TorchDynamoPlugin


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_compiled_model_computes_and_is_saved_as_the_plain_one(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path, dynamo_backend="EAGER")
    plain = Blocks()
    x = torch.randn(2, 3)
    expected = plain(x)
    model = accelerator.prepare(plain)
    assert type(model).__name__ == "OptimizedModule"
    torch.testing.assert_close(model(x), expected)
    assert accelerator.prepare(plain) is model
    assert accelerator.unwrap_model(model) is plain
    assert type(accelerator.unwrap_model(model, keep_torch_compile=True)).__name__ == "OptimizedModule"
    saved = Checkpoint.open(accelerator.save_state()).load("model")["model"]
    assert sorted(saved) == sorted(plain.state_dict())


def test_blocks_that_repeat_are_compiled_one_by_one() -> None:
    plugin = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    plain = Blocks()
    assert accelerator.prepare(plain) is plain
    assert all(block._compiled_call_impl is not None for block in plain.blocks)
    plain(torch.randn(2, 3))


def test_the_environment_may_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTEP_DYNAMO_BACKEND", "eager")
    monkeypatch.setenv("KEEPSTEP_DYNAMO_USE_FULLGRAPH", "true")
    accelerator = Accelerator(cpu=True)
    assert type(accelerator.prepare(Blocks())).__name__ == "OptimizedModule"


def test_unknown_backends_and_two_ways_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match=r"backend='inducter'.*has no such backend here; it has .*inductor"):
        Accelerator(cpu=True, dynamo_backend="inducter")
    with pytest.raises(UsageError, match="both given"):
        Accelerator(cpu=True, dynamo_backend="eager", dynamo_plugin=TorchDynamoPlugin(backend="eager"))


@pytest.mark.parametrize("name", ["deepspeed_plugin", "megatron_lm_plugin", "parallelism_config"])
def test_what_there_is_no_backend_for_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} was given, but keepstep has no backend"):
        Accelerator(cpu=True, **{name: object()})
