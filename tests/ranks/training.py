"""A model that is sharded in every way the ranks allow, trained a few steps, and compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from keepstep.tree import tensors_in  # noqa: F401  (the package under test comes first on the path)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(10, 24)
        self.down = torch.nn.Linear(24, 10)
        self.scale = torch.nn.Parameter(torch.full((3,), 0.5))  # fewer rows than four ranks have
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x))) * self.scale.sum()


def build(kind: str, size: int, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model of one seed: "plain", "fsdp" or "tp" (2-D: tensor parallel within FSDP at four ranks)."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(Block(), Block())
    if kind == "tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        for block in model:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for block in model:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(4, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def give_back(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def whole(value: Any) -> Any:
    """The same nested state with whole plain tensors; every rank takes part."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def same(first: Any, second: Any, path: str = "") -> None:
    """Fail where two states differ in a bit."""
    assert type(first) is type(second), (path, first, second)
    if isinstance(first, dict):
        assert set(first) == set(second), (path, set(first) ^ set(second))
        for key in first:
            same(first[key], second[key], f"{path}/{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            same(one, other, f"{path}/{index}")
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, path
        assert torch.equal(first, second), (path, first, second)
    else:
        assert first == second, (path, first, second)
