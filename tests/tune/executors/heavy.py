"""Trials of a module that imports torch, as many scripts do: their server imports it, once."""

from __future__ import annotations

from typing import Any

import torch

from keepstep import Accelerator, tune


def with_accelerator(config: dict[str, Any]) -> None:
    """Train with an Accelerator: its checkpoints are the trial's, and it goes on from them."""
    accelerator = Accelerator(project_dir=".", cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as directory:
            accelerator.load_state(directory)
    for n in range(config["n"]):
        loss = model(torch.ones(4, 8)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        kept = accelerator.save_state(f"step_{n}")
        tune.report({"loss": loss}, checkpoint=tune.Checkpoint.from_directory(kept))
    state = {"model": model, "n": config["n"]}
    tune.report({"weights": sum(p.sum() for p in model.parameters())}, checkpoint=state)


class Dictionary(tune.Trainable):
    """Its checkpoints are dicts."""

    def setup(self, config: dict[str, Any]) -> None:
        self.n = 0

    def step(self) -> dict[str, Any]:
        self.n += 1
        return {"n": self.n}

    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        return {"n": self.n}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.n = checkpoint["n"]
