"""The cells of a tutorial on training from a notebook, with the import line changed; run as a script.

Ranks are forked from this process, which has made no Accelerator.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from tests.documents.filled_in import create_model, get_dataloaders, label_to_id
from torch.optim.lr_scheduler import OneCycleLR

from keepstep import Accelerator, notebook_launcher
from keepstep.utils import set_seed, write_basic_config


def training_function() -> None:
    accelerator = Accelerator()
    accelerator.print(f"one of {accelerator.num_processes}")


def training_loop(mixed_precision: str = "fp16", seed: int = 42, batch_size: int = 64) -> None:
    set_seed(seed)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    model = create_model("resnet50d", pretrained=True, num_classes=len(label_to_id))
    train_and_evaluate(accelerator, model, batch_size)


def training_loop_of_a_model(
    model: Any, mixed_precision: str = "fp16", seed: int = 42, batch_size: int = 64
) -> None:
    set_seed(seed)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    train_and_evaluate(accelerator, model, batch_size)


def train_and_evaluate(accelerator: Accelerator, model: Any, batch_size: int) -> None:
    train_dataloader, eval_dataloader = get_dataloaders(batch_size)
    for param in model.parameters():
        param.requires_grad = False
    for param in model.get_classifier().parameters():
        param.requires_grad = True
    mean = torch.tensor(model.default_cfg["mean"])[None, :, None, None]
    std = torch.tensor(model.default_cfg["std"])[None, :, None, None]
    mean = mean.to(accelerator.device)
    std = std.to(accelerator.device)
    optimizer = torch.optim.Adam(params=model.parameters(), lr=3e-2 / 25)
    lr_scheduler = OneCycleLR(
        optimizer=optimizer, max_lr=3e-2, epochs=5, steps_per_epoch=len(train_dataloader)
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    for epoch in range(5):
        model.train()
        for batch in train_dataloader:
            inputs = (batch["image"] - mean) / std
            outputs = model(inputs)
            loss = torch.nn.functional.cross_entropy(outputs, batch["label"])
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        model.eval()
        accurate: Any = 0
        num_elems = 0
        for batch in eval_dataloader:
            inputs = (batch["image"] - mean) / std
            with torch.no_grad():
                outputs = model(inputs)
            predictions = outputs.argmax(dim=-1)
            accurate_preds = accelerator.gather(predictions) == accelerator.gather(batch["label"])
            num_elems += accurate_preds.shape[0]
            accurate += accurate_preds.long().sum()
        eval_metric = accurate.item() / num_elems
        accelerator.print(f"epoch {epoch}: {100 * eval_metric:.2f}")
    assert accelerator.num_processes == 2
    frozen = accelerator.unwrap_model(model).features
    assert all(parameter.grad is None for parameter in frozen.parameters())


def on_two_machines() -> None:
    """Each has a notebook: here the second one is a fork of the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    second = os.fork()
    node_rank = 1 if second == 0 else 0
    notebook_launcher(
        training_loop,
        ("no", 42, 8),
        use_port=port,
        master_addr="127.0.0.1",
        node_rank=node_rank,
        num_nodes=2,
        num_processes=1,
    )
    if second == 0:
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(second, 0)[1] == 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert write_basic_config() == Path(os.environ["KEEPSTEP_HOME"], "default_config.yaml")
    notebook_launcher(training_function, num_processes=2)
    args = ("fp16", 42, 8)
    notebook_launcher(training_loop, args, num_processes=2)
    model = create_model("resnet50d", pretrained=True, num_classes=len(label_to_id))
    notebook_launcher(training_loop_of_a_model, (model, "fp16", 42, 8), num_processes=2)
    on_two_machines()
