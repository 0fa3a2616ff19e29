"""Models in parts: the same outputs as of the model in one piece, and weights that wait elsewhere."""

from __future__ import annotations

import gc
import inspect
import json
import logging
from pathlib import Path

import pytest
import torch
from tests.models.networks import Network, logits, network
from torch import nn

from keepstep.errors import UsageError
from keepstep.models.align import AlignDevicesHook
from keepstep.models.dispatch import (
    cpu_offload,
    cpu_offload_with_hook,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
)
from keepstep.models.empty import init_empty_weights
from keepstep.models.export import export_weights
from keepstep.models.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    hook_of,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from keepstep.models.naming import find_tied_parameters
from keepstep.models.offload import OffloadedWeightsLoader, offload_state_dict
from keepstep.models.states import full_state

MAPS = {
    "all on the disk": {"": "disk"},
    "blocks on the disk": {"embedding": "cpu", "head": "cpu", "norm": "cpu", "blocks": "disk"},
    "one block": {"": "cpu", "blocks.1": "disk"},
    "parts of a block": {"": "cpu", "blocks.0.inner": "disk", "blocks.2.inner.0": "disk"},
    "tensors": {"": "cpu", "blocks.0.gain": "disk", "blocks.1.inner.2.bias": "disk"},
    "tied apart": {"": "cpu", "head": "disk"},
}


def on_meta(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if tensor.is_meta]


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_parts_on_the_disk_give_the_same_outputs(
    tmp_path: Path, device_map: dict[str, str], offload_buffers: bool
) -> None:
    model = network()
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    dispatch_model(model, device_map, offload_dir=tmp_path, offload_buffers=offload_buffers)
    waiting = on_meta(model)
    assert waiting
    for _ in range(2):
        assert torch.equal(logits(model), expected)
        assert on_meta(model) == waiting
    whole = full_state(model)
    assert all(torch.equal(whole[name], value) for name, value in state.items())
    assert model.hf_device_map == device_map
    remove_hook_from_submodules(model)
    assert on_meta(model) == []
    assert torch.equal(logits(model), expected)
    model.to("cpu")


def test_a_map_made_from_little_memory_runs(tmp_path: Path) -> None:
    source = network(width=16, blocks=6)
    expected = logits(source)
    export_weights(source.state_dict(), tmp_path / "weights", max_shard_size="8KB")
    with init_empty_weights():
        model = Network(width=16, blocks=6).eval()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert find_tied_parameters(model) == [["embedding.weight", "head.weight"]]
    load_checkpoint_and_dispatch(
        model,
        tmp_path / "weights",
        device_map="auto",
        max_memory={"cpu": "20KB"},
        no_split_module_classes=["Block"],
        offload_folder=tmp_path / "offloaded",
    )
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(model), expected)
    held = sum(p.numel() * p.itemsize for p in model.parameters() if not p.is_meta)
    assert held <= 20_000
    assert not list((tmp_path / "offloaded").glob("*.tmp"))


def test_offloaded_weights_are_not_kept_on_the_host(tmp_path: Path) -> None:
    """Their memory is gone after the hooks are in place, and after each run."""
    model = disk_offload(network(width=64), tmp_path)

    def tensors_of(size: int) -> int:
        gc.collect()
        return sum(
            1 for o in gc.get_objects() if type(o) is nn.Parameter and o.numel() == size and not o.is_meta
        )

    logits(model)
    assert tensors_of(64 * 128) == 0


def test_cpu_offload_and_its_removal_keep_outputs() -> None:
    model = network()
    expected = logits(model)
    cpu_offload(model, "cpu")
    assert set(on_meta(model)) >= {"embedding.weight", "head.weight", "blocks.0.gain"}
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)
    assert hook_of(model.head) is None


def test_preloaded_classes_get_all_their_weights_at_once(tmp_path: Path) -> None:
    class Uncalled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.linear.weight + self.linear.bias

    model, x = nn.Sequential(Uncalled(), nn.Linear(4, 4)), torch.randn(2, 4)
    expected = model(x)
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path, preload_module_classes=["Uncalled"])
    assert torch.equal(model(x), expected)
    assert model[0].linear.weight.is_meta


def test_an_error_in_a_forward_leaves_nothing_loaded(tmp_path: Path) -> None:
    model = disk_offload(network(), tmp_path)
    with pytest.raises(IndexError):
        model(torch.tensor([[999]]))
    assert not [name for name, p in model.named_parameters() if not p.is_meta]
    assert logits(model).isfinite().all()


def test_a_module_that_runs_inside_itself_keeps_its_weights(tmp_path: Path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            inner = self(x, depth - 1) if depth else x
            return inner * self.weight

    model = disk_offload(Nested(), tmp_path)
    assert model(torch.tensor(1.0)).item() == 27.0
    assert model.weight.is_meta


def test_a_dispatched_model_refuses_to_move(tmp_path: Path) -> None:
    model = dispatch_model(network(), {"": "cpu", "blocks": "disk"}, offload_dir=tmp_path)
    with pytest.raises(UsageError, match="can't be moved"):
        model.to("cpu")
    model.to(torch.float32)


def test_what_a_map_cannot_say_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no device to embedding\.weight, blocks"):
        dispatch_model(network(), {"norm": "cpu", "head": "cpu"})
    with pytest.raises(UsageError, match="pass offload_dir"):
        dispatch_model(network(), {"": "disk"})
    if not torch.accelerator.is_available():
        with pytest.raises(UsageError, match="device 0 is not there: this machine has 0 accelerators"):
            dispatch_model(network(), {"": 0, "head": "cpu"})
    with pytest.raises(UsageError, match=r"'fast'; allowed: 'auto'"):
        load_checkpoint_and_dispatch(network(), tmp_path, device_map="fast")


def test_weights_that_are_in_no_folder_are_named(tmp_path: Path) -> None:
    with init_empty_weights():
        model = Network()
    offload_state_dict(tmp_path, {"other": torch.zeros(2)})
    with pytest.raises(UsageError, match="not among the offloaded weights"):
        dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)


def test_a_folder_that_is_used_again_holds_the_new_weights(tmp_path: Path) -> None:
    first, second = network(1), network(2)
    expected = logits(second)
    disk_offload(first, tmp_path)
    disk_offload(second, tmp_path)
    assert torch.equal(logits(second), expected)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    entries = json.loads((tmp_path / "index.json").read_text())
    assert entries["head.weight"]["weight_name"] == "embedding.weight"
    loader = OffloadedWeightsLoader(save_folder=tmp_path)
    assert set(loader) == set(second.state_dict())


def test_a_pipeline_of_models_on_one_device() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    expected = second(first(x))
    first, handle = cpu_offload_with_hook(first, "cpu")
    second, other = cpu_offload_with_hook(second, "cpu", prev_module_hook=handle)
    assert torch.equal(second(first(x)), expected)
    other.offload()
    other.remove()
    assert hook_of(second) is None


def test_hooks_see_arguments_and_outputs_and_go_without_trace() -> None:
    class Doubling(ModelHook):
        def pre_forward(
            self, module: nn.Module, *args: torch.Tensor, **kwargs: object
        ) -> tuple[object, object]:
            return tuple(2 * arg for arg in args), kwargs

    class Adding(ModelHook):
        no_grad = True

        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output + 1

    layer, x = nn.Linear(2, 2), torch.randn(1, 2)
    plain, doubled = layer(x), layer(2 * x)
    add_hook_to_module(layer, Doubling())
    assert torch.equal(layer(x), doubled)
    add_hook_to_module(layer, Adding(), append=True)
    assert isinstance(hook_of(layer), SequentialHook)
    assert torch.equal(layer(x), doubled + 1)
    add_hook_to_module(layer, Adding())
    assert not layer(x).requires_grad
    assert torch.equal(layer(x), plain + 1)
    assert "input" in inspect.signature(layer.forward).parameters
    remove_hook_from_module(layer)
    assert torch.equal(layer(x), plain)
    assert "forward" not in vars(layer)


def test_buffers_on_the_host_stay_where_they_are_when_only_weights_are_offloaded(tmp_path: Path) -> None:
    model = disk_offload(network(), tmp_path)
    assert not model.blocks[0].shift.is_meta
    assert isinstance(hook_of(model.blocks[0]), AlignDevicesHook)
    assert not model.positions.is_meta


def test_a_map_of_one_device_needs_no_hooks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = dispatch_model(network(), {"": "cpu"})
    assert hook_of(model) is None
    assert caplog.text == ""


def test_a_folder_of_weights_loses_what_is_replaced_and_keeps_what_is_not_ours(tmp_path: Path) -> None:
    foreign = tmp_path / "offloaded-by-hand.safetensors"
    foreign.write_bytes(b"somebody's")
    for value in range(2):
        offload_state_dict(tmp_path, {"w": torch.full((2,), float(value))})
    assert foreign.exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert OffloadedWeightsLoader(save_folder=tmp_path)["w"].tolist() == [1.0, 1.0]
