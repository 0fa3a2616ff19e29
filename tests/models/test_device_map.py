"""Plans of where modules go, made from sizes alone; the same as Accelerate's where that is right."""

from __future__ import annotations

import itertools
import logging
import random

import accelerate.utils as theirs
import pytest
import torch
from tests.models.networks import Network
from torch import nn

from keepstep.errors import UsageError
from keepstep.models.device_map import (
    check_device_map,
    clean_device_map,
    get_balanced_memory,
    infer_auto_device_map,
)
from keepstep.models.empty import init_empty_weights
from keepstep.models.naming import placed_on, set_module_tensor_to_device
from keepstep.models.sizes import compute_module_sizes, convert_file_size_to_int, get_max_memory


class Parts(nn.Module):
    """Modules under names that occur once; Accelerate takes "1" to be within "2.1"."""

    numbers = itertools.count()

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for part in parts:
            self.add_module(f"m{next(self.numbers)}x", part)


class Whole(Parts):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.gain = nn.Parameter(torch.zeros(5))


def random_module(draw: random.Random, depth: int) -> nn.Module:
    if depth == 0 or draw.random() < 0.3:
        sizes = draw.randint(1, 30), draw.randint(1, 30)
        return draw.choice([nn.Linear(*sizes), nn.LayerNorm(sizes[0]), nn.Identity()])
    parts = [random_module(draw, depth - 1) for _ in range(draw.randint(1, 4))]
    return draw.choice([Parts, Whole])(*parts)


@pytest.mark.parametrize("seed", range(40))
def test_a_plan_is_that_of_accelerate(seed: int) -> None:
    """With fake memory of up to three accelerators, a CPU and the disk."""
    draw = random.Random(seed)
    model = Parts(*(random_module(draw, 3) for _ in range(draw.randint(1, 5))))
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if len(layers) > 1 and draw.random() < 0.5:
        first, second = draw.sample(layers, 2)
        second.weight = first.weight
    assert dict(compute_module_sizes(model)) == dict(theirs.compute_module_sizes(model))
    total = compute_module_sizes(model)[""]
    memory: dict[int | str, int] = {number: draw.randint(0, total) for number in range(draw.randint(0, 3))}
    memory["cpu"] = draw.randint(0, total)
    whole = draw.choice([None, ["Whole"], "Linear"])
    options = {"clean_result": draw.random() < 0.5, "fallback_allocation": draw.random() < 0.3}
    ours = infer_auto_device_map(model, memory, whole, **options)
    check_device_map(model, ours)
    try:
        expected = theirs.infer_auto_device_map(model, dict(memory), whole, **options)
    except IndexError:  # it stumbles over a tied module that has its place already
        return
    assert ours == dict(expected)
    balanced = get_balanced_memory(model, memory, whole)
    assert balanced == theirs.get_balanced_memory(model, dict(memory), whole)


def test_tied_weights_go_to_one_device_and_nothing_is_overfilled() -> None:
    with init_empty_weights():
        model = Network(width=32, blocks=8)
    sizes = compute_module_sizes(model)
    for limit in ("60KB", "100KB", "150KB"):
        memory = {0: limit, 1: limit, "cpu": limit}
        device_map = infer_auto_device_map(model, memory, ["Block"])
        check_device_map(model, device_map)
        assert placed_on(device_map, "embedding") == placed_on(device_map, "head")
        for device in (0, 1, "cpu"):
            held = sum(
                sizes[name] for name, _ in model.named_parameters() if placed_on(device_map, name) == device
            )
            assert held <= convert_file_size_to_int(limit)


def test_buffers_of_a_module_that_is_split_have_a_place() -> None:
    model = Network(width=16, blocks=2)
    device_map = infer_auto_device_map(model, {"cpu": "6KB"})
    assert "blocks.1.shift" in device_map or "blocks.0.shift" in device_map
    check_device_map(model, device_map)


def test_balanced_memory_of_accelerators_without_the_first() -> None:
    memory = get_balanced_memory(Network(), {1: "1MB", 2: "1MB"}, ["Block"], low_zero=True)
    assert list(memory) == [1, 2]


def test_balanced_memory_leaves_the_first_accelerator_empty_if_asked() -> None:
    model = Network(width=32, blocks=8)
    memory = get_balanced_memory(model, {0: "1MB", 1: "1MB", 2: "1MB"}, ["Block"], low_zero=True)
    assert memory[0] == 0
    device_map = infer_auto_device_map(model, memory, ["Block"])
    assert set(device_map.values()) == {1, 2}


def test_dtypes_that_are_asked_for_count() -> None:
    model = Network()
    whole, half = compute_module_sizes(model), compute_module_sizes(model, dtype="float16")
    assert half[""] * 2 == whole[""]
    special = compute_module_sizes(model, dtype="float16", special_dtypes={"norm.weight": torch.float32})
    assert special["norm"] == half["norm"] + 16
    assert compute_module_sizes(model, buffers_only=True)[""] == 4 * 8 * 4


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("1KB", 1000),
        ("1.5GB", 1_500_000_000),
        ("1GiB", 1 << 30),
        ("2mib", 2 << 20),
        ("8Gb", 10**9),
        (" 3 MB ", 3_000_000),
    ],
)
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert convert_file_size_to_int(text) == size


def test_memory_is_measured_or_read(caplog: pytest.LogCaptureFixture) -> None:
    measured = get_max_memory()
    assert all(size > 0 for size in measured.values())
    if not torch.accelerator.is_available():
        assert list(measured) == ["cpu"]
        with caplog.at_level(logging.WARNING):
            assert list(get_max_memory({"disk": 1, "cpu": "1GB", 1: 5, 0: 7})) == [0, 1, "cpu", "disk"]
        assert "this machine has 0 accelerators" in caplog.text
    with pytest.raises(UsageError, match="names the device 'gpu'"):
        get_max_memory({"gpu": 1})


def test_maps_are_cleaned_and_checked(caplog: pytest.LogCaptureFixture) -> None:
    assert clean_device_map({"a.x": 0, "a.y": 0, "b.x": 0, "b.y": 1}) == {"a": 0, "b.x": 0, "b.y": 1}
    assert clean_device_map({"a": "cpu", "b": "cpu"}) == {"": "cpu"}
    with pytest.raises(UsageError, match=r"gives no device to norm\.weight, norm\.bias"):
        check_device_map(Network(), {"embedding": 0, "head": 0, "blocks": 0})
    with caplog.at_level(logging.WARNING):
        check_device_map(Network(), {"": 0, "nowhere": 1})
    assert "modules that are not there: nowhere" in caplog.text


def test_a_tensor_is_replaced_or_the_reason_told() -> None:
    model = Network()
    set_module_tensor_to_device(model, "norm.weight", "meta")
    assert model.norm.weight.is_meta
    with pytest.raises(UsageError, match="has no values to put on cpu"):
        set_module_tensor_to_device(model, "norm.weight", "cpu")
    with pytest.raises(UsageError, match=r"has the shape \[8\], and the value for it \[3\]"):
        set_module_tensor_to_device(model, "norm.weight", "cpu", torch.ones(3))
    with pytest.raises(UsageError, match="no parameter or buffer named 'w'"):
        set_module_tensor_to_device(model, "norm.w", "cpu")
    with pytest.raises(UsageError, match="has no module 'none'"):
        set_module_tensor_to_device(model, "none.w", "cpu")
    set_module_tensor_to_device(model, "norm.weight", "cpu", torch.ones(8), dtype="bfloat16")
    assert model.norm.weight.dtype is torch.bfloat16
    assert isinstance(model.norm.weight, nn.Parameter)
