"""A run whose automatic checkpoints go to a bucket, or to a directory with a mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.buckets.server import SECRET_KEY, Server

from keepstep import Accelerator, CheckpointPolicy, ProjectConfiguration, Store


def train(project: ProjectConfiguration, steps: int) -> tuple[int, list[float]]:
    """Some steps, on one rank or more; returns where it began, and the weights."""
    torch.manual_seed(0)
    accelerator = Accelerator(
        project_config=project, checkpoint_policy=CheckpointPolicy(every_n_steps=1), cpu=True
    )
    model = torch.nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    found = accelerator.resume()
    began = 0 if found is None else found.step or 0
    for step in range(began, steps):
        accelerator.backward(model(torch.full((2, 4), float(step))).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        accelerator.checkpoint()
    accelerator.wait_for_checkpoint()
    store = accelerator._saver._store
    if store is not None and store.mirror is not None:
        store.mirror.wait()  # as at the end of a process: another store of this one would upload as well
    weights = accelerator.unwrap_model(model).weight.detach().flatten().tolist()
    accelerator.free_memory()
    return began, weights


@pytest.mark.parametrize("kind", ["bucket", "mirror"])
def test_a_run_goes_on_on_another_machine(server: Server, address: str, tmp_path: Path, kind: str) -> None:
    def project(machine: str) -> ProjectConfiguration:
        options: dict[str, Any] = {"storage_options": server.options()}
        if kind == "bucket":
            return ProjectConfiguration(project_dir=address, **options)
        return ProjectConfiguration(project_dir=tmp_path / machine, mirror=address, **options)

    assert SECRET_KEY not in repr(project("first"))
    assert train(project("first"), 3)[0] == 0
    if kind == "mirror":
        store = Store(tmp_path / "first" / "checkpoints", mirror=address, storage_options=server.options())
        store.claim()
        assert store.mirror is not None
        store.mirror.wait()
    began, weights = train(project("second"), 6)
    assert began == 3
    whole = train(ProjectConfiguration(project_dir=tmp_path / "whole"), 6)
    assert weights == whole[1]
