"""Saved and loaded: every dtype, memory layout, optimizer, scheduler and module, bit by bit."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from tests.checkpoint.equality import assert_same, tensor_bytes
from tests.test_tree import EXAMPLES, NUMPY, states
from torch import nn
from torch.optim import lr_scheduler

from keepstep.checkpoint.format.manifest import ITEMSIZES
from keepstep.checkpoint.store import Store
from keepstep.tree import DTYPES


def saved(tmp_path: Path, state: Any) -> Any:
    checkpoint = Store(tmp_path).save(state)
    report = checkpoint.verify()
    assert report.sound, report.problems
    return checkpoint


def bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with every kind of bit pattern: NaN payloads, infinities, signed zeros."""
    count = int(np.prod(shape))
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def savable_dtypes() -> list[str]:
    names = []
    for name, dtype in DTYPES.items():
        try:
            bits(dtype, (2, 3)).clone()
        except (RuntimeError, NotImplementedError):  # torch knows the name, but can't hold a value of it yet
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("name", savable_dtypes())
def test_every_dtype(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    assert ITEMSIZES[name] == dtype.itemsize
    state = {"t": [bits(dtype, shape) for shape in ((), (0,), (3, 0, 2), (7,), (2, 3, 5))]}
    checkpoint = saved(tmp_path, state)
    assert_same(checkpoint.load(), state)
    assert_same(checkpoint.load(verify=False), state)
    live = {"t": [torch.zeros(t.shape, dtype=torch.uint8).to(torch.uint8) for t in state["t"]]}
    live = {"t": [torch.empty_like(t) for t in state["t"]]}
    checkpoint.load_into(live)
    assert_same(live, state)


def test_all_dtypes_in_one_file_stay_aligned(tmp_path: Path) -> None:
    state = {"t": {name: bits(DTYPES[name], (5,)) for name in savable_dtypes()}}
    checkpoint = saved(tmp_path, state)
    assert_same(checkpoint.load(), state)
    live = {"t": {name: torch.empty_like(t) for name, t in state["t"].items()}}
    checkpoint.load_into(live)
    assert_same(live, state)


def over(base: Any, *views: Callable[[Any], Any]) -> list[Any]:
    """Views of one memory."""
    return [view(base) for view in views]


def it(base: Any) -> Any:
    return base


LAYOUTS: dict[str, Callable[[], Any]] = {
    "transposed": lambda: torch.randn(3, 5).t(),
    "strided": lambda: torch.randn(20)[::3],
    "offset": lambda: torch.randn(20)[7:],
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "expanded scalar": lambda: torch.tensor(2.5).expand(1000, 1000),
    "conj": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "neg": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "conj beside its base": lambda: over(
        torch.randn(4, dtype=torch.cfloat), it, torch.conj, torch.view_as_real
    ),
    "flipped": lambda: torch.randn(4, 5).flip(0),
    "views of one storage": lambda: over(
        torch.randn(24),
        it,
        lambda b: b[2:5],
        lambda b: b.view(4, 6),
        lambda b: b[3],
        lambda b: b[::2],
        lambda b: b[:0],
    ),
    "views without their base": lambda: over(
        torch.randn(24), lambda b: b[2:5], lambda b: b[4:9], lambda b: b[10:12]
    ),
    "tied": lambda: over(torch.randn(24), it, it),
    "tied transposed": lambda: over(torch.randn(3, 4), it, torch.t),
    "transposed twice": lambda: over(torch.randn(3, 4), torch.t, torch.t),
    "other dtype over the same bytes": lambda: over(
        torch.randn(6), it, lambda b: b.view(torch.int32), lambda b: b.view(torch.uint8)
    ),
    "odd offset": lambda: over(
        torch.arange(9, dtype=torch.uint8), it, lambda b: b[1:5], lambda b: torch.zeros_like(b)[:3]
    ),
    "parameter": lambda: nn.Parameter(torch.randn(3)),
    "requires grad": lambda: torch.randn(3, requires_grad=True) * 2,
    "array and tensor over the same memory": lambda: over(
        np.arange(5.0), it, torch.from_numpy, lambda a: a[1:]
    ),
    "many dimensions": lambda: torch.randn([1] * 20 + [2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_memory_layout(tmp_path: Path, name: str) -> None:
    state = {"t": LAYOUTS[name]()}
    checkpoint = saved(tmp_path, state)
    assert_same(_detached(checkpoint.load()), _detached(state))
    state["first"] = torch.zeros(3, dtype=torch.uint8)
    assert_same(_detached(Store(tmp_path).save(state).load()), _detached(state))


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return [_detached(item) for item in value] if isinstance(value, list) else value


def test_sharing_survives_a_load(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {
        "a": {"w": base, "tied": base, "turned": base.t(), "row": base[1], "bytes": base.view(torch.uint8)}
    }
    checkpoint = saved(tmp_path, state)
    assert checkpoint.bytes < 2 * 4096 + base.nbytes, "stored once"
    loaded = checkpoint.load()["a"]
    loaded["w"][1, 2] = 77.0
    assert loaded["tied"][1, 2] == loaded["turned"][2, 1] == loaded["row"][2] == 77.0


def test_an_expanded_tensor_is_stored_at_its_own_size_beside_its_base(tmp_path: Path) -> None:
    base = torch.randn(1)
    assert saved(tmp_path, {"a": [base, base.expand(1 << 20)]}).bytes < 16384


def test_writing_to_what_was_loaded_changes_no_file(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.ones(10), "n": np.ones(3)})
    loaded = checkpoint.load()
    loaded["w"].fill_(5)
    loaded["n"][:] = 6
    assert checkpoint.verify().sound
    assert_same(checkpoint.load(), {"w": torch.ones(10), "n": np.ones(3)})


@pytest.mark.parametrize("name", [*EXAMPLES, *NUMPY])
def test_plain_and_numpy_values(tmp_path: Path, name: str) -> None:
    state = {"x": {**EXAMPLES, **NUMPY}[name]}
    assert_same(saved(tmp_path, state).load(), state)


def comes_back(state: Any) -> None:
    with tempfile.TemporaryDirectory() as root:  # pytest's own are told apart by looking through all of them
        checkpoint = Store(root).save(state)
        assert checkpoint.verify().sound
        assert_same(checkpoint.load(), state)


@given(states)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_state(state: Any) -> None:
    comes_back(state)


@pytest.mark.soak
@given(states)
@settings(max_examples=2000, derandomize=False, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_state_for_long(state: Any) -> None:
    comes_back(state)


ODD_ROOTS: dict[str, Any] = {
    "a tensor": torch.ones(3),
    "a number": 5,
    "a list": [1, torch.ones(2)],
    "an empty dict": {},
    "none": None,
    "an empty name": {"": torch.ones(1)},
    "slashes": {"a/b": {"c": torch.ones(2)}, "a": {"b/c": torch.zeros(2)}},
    "safetensors' own name": {"__metadata__": {"__metadata__": torch.ones(2)}},
    "a long name": {"x" * 300: torch.ones(1)},
    "a way out": {"../../etc": torch.ones(1)},
    "dots": {".": torch.ones(1), "..": torch.ones(2)},
    "two cases": {"A": torch.ones(1), "a": torch.zeros(1)},
    "surrogates": {"\ud800": {"\udfff": torch.ones(1)}},
    "names of ours": {"manifest": torch.ones(1), "state": torch.ones(2)},
    "no strings": {("t", 1): torch.ones(1), 5: torch.ones(2), None: torch.ones(3)},
}


@pytest.mark.parametrize("name", ODD_ROOTS)
def test_odd_roots_and_names(tmp_path: Path, name: str) -> None:
    state = ODD_ROOTS[name]
    checkpoint = saved(tmp_path, state)
    assert_same(checkpoint.load(), state)
    assert {p.parent for p in tmp_path.rglob("*.safetensors")} <= {checkpoint.path}


def test_a_large_group_is_split_and_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "keepstep.checkpoint.saving.layout.plan.__kwdefaults__", {"segment_limit_bytes": 10_000}
    )
    state = {
        "model": {f"w{i}": torch.randn(1000) for i in range(7)}
        | {"big": torch.randn(5000), "e": torch.zeros(0)}
    }
    checkpoint = saved(tmp_path, state)
    index = json.loads((checkpoint.path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for name, tensor in state["model"].items():
        loaded = safetensors.torch.load_file(checkpoint.path / index["weight_map"][name])
        assert_same(loaded[name], tensor)
    assert_same(checkpoint.load(), state)
    live = {"model": {name: torch.empty_like(t) for name, t in state["model"].items()}}
    checkpoint.load_into(live)
    assert_same(live, state)


@pytest.mark.parametrize("background", [False, True])
def test_tensors_over_several_blocks(tmp_path: Path, background: bool) -> None:
    state = {
        "m": {"a": bits(torch.uint8, (20 << 20,)), "b": bits(torch.int16, (3, 1 << 20)), "c": torch.ones(3)}
    }
    kept = copy.deepcopy(state)
    store = Store(tmp_path, memory_budget_bytes=16 << 20)
    if background:
        pending = store.save_in_background(state)
        for tensor in state["m"].values():  # what changes after the call must not be in the checkpoint
            tensor.zero_()
        checkpoint = pending.wait()
    else:
        checkpoint = store.save(state)
    assert_same(checkpoint.load(), kept)
    live = {"m": {name: torch.zeros_like(t) for name, t in kept["m"].items()}}
    checkpoint.load_into(live)
    assert_same(live, kept)
    assert checkpoint.verify().sound


# -------------------------------------------------------------------- modules, optimizers, schedulers


class TiedGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())
        self.register_buffer("scratch", torch.randn(3), persistent=False)


class WithExtra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)
        self.seen: dict[str, Any] = {}

    def get_extra_state(self) -> Any:
        return {"seen": self.seen, "t": torch.full((2,), float(len(self.seen)))}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class WithHooks(nn.Module):
    """Saves under another name, and takes that name back."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 3)
        self.register_state_dict_post_hook(self._rename)
        self.register_load_state_dict_pre_hook(self._rename_back)

    @staticmethod
    def _rename(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        state[prefix + "kernel"] = state.pop(prefix + "lin.weight").t().contiguous()

    @staticmethod
    def _rename_back(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        state[prefix + "lin.weight"] = state.pop(prefix + "kernel").t()


class WithCache(nn.Module):
    """Keeps something that a load has to build anew."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 3)
        self.cache = self.lin.weight.detach().sum()
        self.register_load_state_dict_post_hook(self._refresh)

    @staticmethod
    def _refresh(module: Any, _keys: Any) -> None:
        module.cache = module.lin.weight.detach().sum()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 4),
    "tied gpt": TiedGPT,
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "gru of bf16": lambda: nn.GRU(3, 4).bfloat16(),
    "channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    "extra state": WithExtra,
    "state dict hooks": WithHooks,
    "load hooks": WithCache,
    "without parameters": nn.ReLU,
    "complex": lambda: nn.Linear(2, 2, dtype=torch.complex64),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "frozen": lambda: nn.Linear(2, 2).requires_grad_(False),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_restored_in_place(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    module = MODULES[name]()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_()
    if isinstance(module, WithExtra):
        module.seen = {"a": 1}
    checkpoint = saved(tmp_path, {"model": module, "n": 1})
    want = copy.deepcopy(module.state_dict())
    assert_same(checkpoint.load()["model"], want)
    torch.manual_seed(2)
    other = MODULES[name]()
    addresses = {key: value.data_ptr() for key, value in dict(other.named_parameters()).items()}
    strides = {key: value.stride() for key, value in other.named_parameters()}
    checkpoint.load_into({"model": other, "n": 0})
    assert_same(other.state_dict(), want)
    assert addresses == {key: value.data_ptr() for key, value in other.named_parameters()}
    assert strides == {key: value.stride() for key, value in other.named_parameters()}
    if isinstance(other, TiedGPT):
        assert other.head.weight is other.embed.weight
    if isinstance(other, WithCache):
        assert other.cache == other.lin.weight.detach().sum()
    if isinstance(other, WithExtra):
        assert other.seen == {"a": 1}


def trained(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    steps: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)).to(dtype)
    optimizer = make([p for p in model.parameters() if p.ndim == 2])
    for _ in range(steps):
        train_step(model, optimizer)
    return model, optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    dtype = next(model.parameters()).dtype

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 12, dtype=dtype).reshape(3, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 0.1, "name": "a"}, {"params": p[1:]}]
    ),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
    "AdamW named": lambda p: torch.optim.AdamW([(f"p{i}", q) for i, q in enumerate(p)]),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, history_size=3),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
    "ASGD": torch.optim.ASGD,
    "Muon": torch.optim.Muon,
}


@pytest.mark.parametrize("live_steps", [0, 1])
@pytest.mark.parametrize("saved_steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_as_if_nothing_had_happened(
    tmp_path: Path, name: str, saved_steps: int, live_steps: int
) -> None:
    model, optimizer = trained(OPTIMIZERS[name], saved_steps, seed=1)
    checkpoint = saved(tmp_path, {"model": model, "optimizer": optimizer})
    assert_same(checkpoint.load()["optimizer"], optimizer.state_dict())
    other_model, other = trained(OPTIMIZERS[name], live_steps, seed=2)
    checkpoint.load_into({"model": other_model, "optimizer": other})
    assert_same(other.state_dict(), optimizer.state_dict())
    for _ in range(2):
        train_step(model, optimizer)
        train_step(other_model, other)
    assert_same(_detached(dict(other_model.state_dict())), _detached(dict(model.state_dict())))
    assert_same(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("live_steps", [0, 1])
def test_float32_optimizer_state_of_bfloat16_weights_survives(tmp_path: Path, live_steps: int) -> None:
    _model, optimizer = trained(OPTIMIZERS["AdamW"], 2, seed=1, dtype=torch.bfloat16)
    for entry in optimizer.state.values():
        entry["exp_avg"] = torch.randn(entry["exp_avg"].shape)
        entry["master"] = torch.randn(entry["exp_avg"].shape, dtype=torch.float64)
    checkpoint = saved(tmp_path, {"optimizer": optimizer})
    _, other = trained(OPTIMIZERS["AdamW"], live_steps, seed=2, dtype=torch.bfloat16)
    checkpoint.load_into({"optimizer": other})
    assert_same(other.state_dict(), optimizer.state_dict())


def test_a_stepped_optimizer_keeps_its_memory(tmp_path: Path) -> None:
    _model, optimizer = trained(OPTIMIZERS["AdamW"], 2, seed=1)
    checkpoint = saved(tmp_path, {"optimizer": optimizer})
    _, other = trained(OPTIMIZERS["AdamW"], 1, seed=2)
    before = [entry["exp_avg"].data_ptr() for entry in other.state.values()]
    checkpoint.load_into({"optimizer": other})
    assert before == [entry["exp_avg"].data_ptr() for entry in other.state.values()]


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.MultiStepLR(o, [1, 3])]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    named = set(lr_scheduler.__all__) - {"LRScheduler", "WarmRestarts"}
    assert named <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore")
def test_schedulers_go_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        train_step(model, optimizer)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    model, optimizer = trained(OPTIMIZERS["SGD momentum"], 0, seed=1)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(3):
        step(model, optimizer, scheduler)
    everything = {"model": model, "optimizer": optimizer, "train": {"schedulers": [scheduler]}}
    checkpoint = saved(tmp_path, everything)
    as_state_dicts = Store(tmp_path).save({"train": [scheduler.state_dict()]})
    assert_same(as_state_dicts.load(), {"train": [scheduler.state_dict()]})
    other_model, other = trained(OPTIMIZERS["SGD momentum"], 0, seed=2)
    other_scheduler = SCHEDULERS[name](other)
    checkpoint.load_into(
        {"model": other_model, "optimizer": other, "train": {"schedulers": [other_scheduler]}}
    )
    for _ in range(4):
        step(model, optimizer, scheduler)
        step(other_model, other, other_scheduler)
        assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in other.param_groups]
    assert_same(_detached(dict(other_model.state_dict())), _detached(dict(model.state_dict())))


def test_anybody_can_read_the_weights(tmp_path: Path) -> None:
    model = TiedGPT()
    checkpoint = saved(tmp_path, {"model": model})
    read = safetensors.torch.load_file(checkpoint.path / "model.safetensors")
    for name, tensor in read.items():
        assert tensor_bytes(tensor) == tensor_bytes(model.state_dict()[name])
