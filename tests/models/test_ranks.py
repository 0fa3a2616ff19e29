"""Models out of and into a run of two ranks: copies (DDP) and shards (FSDP2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks.spawn import run_ranks

import keepstep
from keepstep.errors import MismatchError, RankFailedError, StoreError
from keepstep.train.settings.plugins import FullyShardedDataParallelPlugin


def network(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))


def expected(seed: int) -> dict[str, torch.Tensor]:
    return network(seed).state_dict()


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def both(root: str, rank: int, size: int) -> None:
    """All in one start of the processes."""
    for kind in ("copies", "shards"):
        plugin = FullyShardedDataParallelPlugin() if kind == "shards" else None
        accelerator = keepstep.Accelerator(cpu=True, fsdp_plugin=plugin, project_dir=f"{root}/{kind}-project")
        inner = network(1)
        model, optimizer = accelerator.prepare(inner, torch.optim.SGD(inner.parameters(), 0.1))
        _out_and_in(accelerator, model, Path(root) / kind, rank, sharded=plugin is not None)
        _hooks(accelerator, model, optimizer)
        accelerator.end_training()
        accelerator.free_memory()
    _a_main_process_that_cannot_write(accelerator, model, Path(root), rank)


def _out_and_in(accelerator: Any, model: Any, directory: Path, rank: int, *, sharded: bool) -> None:
    accelerator.save_model(model, directory, max_shard_size=100)
    state = accelerator.get_state_dict(model)
    assert same(state, {} if sharded and rank else expected(1))
    accelerator.save(state, directory / "state")
    accelerator.wait_for_everyone()
    assert same(keepstep.load(directory / "state"), expected(1))
    assert same(keepstep.models.weights.read_weights(directory), expected(1))
    export = directory / "other"
    if rank == 0:
        keepstep.models.export.export_weights(expected(2), export)
        keepstep.models.export.export_weights({"0.weight": torch.zeros(5, 5)}, directory / "wrong")
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    with pytest.raises(MismatchError, match="nothing was changed"):
        keepstep.load_checkpoint_in_model(unwrapped, directory / "wrong")
    keepstep.load_checkpoint_in_model(unwrapped, export, strict=True)
    whole = accelerator.get_state_dict(model)
    assert same(whole, {} if sharded and rank else expected(2))


def _hooks(accelerator: Any, model: Any, optimizer: Any) -> None:
    def save(models: list[Any], weights: list[Any], output_dir: str) -> None:
        if accelerator.is_main_process:
            (Path(output_dir) / "config.json").write_text(json.dumps(len(weights)))

    read: list[int] = []

    def load(models: list[Any], input_dir: str) -> None:
        read.append(json.loads((Path(input_dir) / "config.json").read_text()))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    optimizer.zero_grad()
    project = Path(accelerator.project_dir)
    left, of_another = (project / f".keepstep-hooks-{of}-k1ll_ed0" for of in ("checkpoints", "checkpoints-b"))
    if accelerator.is_main_process:
        for directory in (left, of_another):
            (directory / "below").mkdir(parents=True)
            (directory / "below" / "weights").write_bytes(b"many")
    accelerator.wait_for_everyone()
    place = accelerator.save_state()
    assert list(project.glob(".keepstep-hooks-*")) == [of_another]
    accelerator.load_state(place)
    assert accelerator.resume() is not None
    assert read == [1, 1]


def _a_main_process_that_cannot_write(accelerator: Any, model: Any, root: Path, rank: int) -> None:
    """Its error is told on all ranks, and nobody waits."""
    if rank == 0:
        (root / "file").write_text("")
    accelerator.wait_for_everyone()
    with pytest.raises(RankFailedError if rank else StoreError, match="file"):
        accelerator.save_model(network(1), root / "file" / "below")


def test_copies_and_shards_go_out_and_in(tmp_path: Path) -> None:
    run_ranks(__file__, "both", 2, tmp_path, timeout_s=150)
    shards = sorted(path.name for path in (tmp_path / "shards").glob("model-*"))
    assert shards == sorted(path.name for path in (tmp_path / "copies").glob("model-*"))
    assert len(shards) > 1
    parts = [load_file(tmp_path / "shards" / name) for name in shards]
    assert same({name: value for part in parts for name, value in part.items()}, expected(1))
