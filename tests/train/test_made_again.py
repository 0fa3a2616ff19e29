"""A checkpoint that is made again, since tensors had changed while it was copied: what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.holding import Held
from tests.train.test_overlap import make, train_step

from keepstep.checkpoint.store import Store
from keepstep.train.settings.config import CheckpointPolicy


def spoiled_at_step_two(path: Path, held: Held, tags: Sequence[str]) -> tuple[Any, ...]:
    """A run whose checkpoint of step 2 is lost, as a weight was written to behind the optimizer's back."""
    accelerator, model, optimizer = make(path, CheckpointPolicy(every_n_steps=2, staging="overlapped"))
    train_step(accelerator, model, optimizer)
    accelerator.checkpoint(metrics={"loss": 1.0})
    train_step(accelerator, model, optimizer)
    held.opened.clear()
    accelerator.checkpoint(metrics={"loss": 2.0}, tags=tags)
    with torch.no_grad():
        model.layers[0].weight.add_(1)
    held.opened.set()
    return accelerator, model, optimizer


def said(path: Path) -> tuple[int | None, Mapping[str, Any], Sequence[str]]:
    (made,) = Store(path / "checkpoints").list()
    return made.step, dict(made.metrics), made.tags


@pytest.mark.parametrize("tags", ["best", ("best", "first")])
def test_the_same_step_keeps_its_metrics_and_each_tag_once(tmp_path: Path, held: Held, tags: Any) -> None:
    accelerator, _, _ = spoiled_at_step_two(tmp_path, held, tags)
    accelerator.wait_for_checkpoint()
    assert said(tmp_path) == (2, {"loss": 2.0}, ("best",) if tags == "best" else tags)


def test_a_later_step_is_not_given_the_metrics_of_the_lost_one(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = spoiled_at_step_two(tmp_path, held, ("best",))
    for _ in range(2):  # without a call of checkpoint()
        train_step(accelerator, model, optimizer)
    accelerator.end_training()
    assert said(tmp_path) == (4, {}, ("best",))


def test_a_tag_of_the_lost_one_and_of_the_next_call_is_kept_once(tmp_path: Path, held: Held) -> None:
    accelerator, model, optimizer = spoiled_at_step_two(tmp_path, held, ("best", "first"))
    train_step(accelerator, model, optimizer)
    while accelerator.checkpoint(metrics={"loss": 3.0}, tags=("best", "late")) is None:
        pass  # until it is known that the last one is lost
    accelerator.wait_for_checkpoint()
    assert said(tmp_path) == (3, {"loss": 3.0}, ("best", "first", "late"))
