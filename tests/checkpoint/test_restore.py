"""load_into: all of it or nothing; every mismatch is named; damage says what it left behind."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.equality import assert_same, difference
from torch import nn

from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DigestError,
    MismatchError,
    MissingFileError,
    NoValidCheckpointError,
    RestoreError,
    UnsupportedTypeError,
    UsageError,
)
from keepstep.tree import leaf, register_codec


class Counter:
    """A registered object of the user's."""

    def __init__(self, count: int = 0) -> None:
        self.count = count
        self.table = torch.full((3,), float(count))

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "table": self.table}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.table = state["table"]


class Refuses(Counter):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = -1
        if state["count"] != 0:
            raise ValueError("not this one")


def everything(seed: int, steps: int = 2) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * seed)
    for _ in range(steps):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "counter": Counter(seed),
        "train": {
            "step": seed,
            "list": [seed, {"deep": str(seed)}],
            "t": torch.randn(3),
            "n": np.full(4, seed),
        },
    }


def frozen(objects: Any) -> Any:
    """A copy of every byte of a live state."""
    if hasattr(objects, "state_dict"):
        return copy.deepcopy(objects.state_dict())
    if isinstance(objects, dict):
        return {key: frozen(value) for key, value in objects.items()}
    return copy.deepcopy(objects)


def test_everything_is_restored(tmp_path: Path) -> None:
    saved = everything(1)
    checkpoint = Store(tmp_path).save(saved)
    for steps in (0, 3):
        live = everything(2, steps)
        checkpoint.load_into(live)
        assert_same(frozen(live), frozen(saved))


MISMATCHES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "root key too many": (lambda o: o.update(more=1), "missing from the checkpoint: more"),
    "root key too few": (lambda o: o.pop("counter"), "unexpected in the checkpoint: counter"),
    "another shape": (
        lambda o: o.update(model=nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4), nn.Linear(4, 2))),
        r"model/0.weight: saved with shape \[4, 3\] and dtype float32, live with shape \[5, 3\]",
    ),
    "another dtype": (lambda o: o["model"].double(), "model/2.bias: saved .* float32, live .* float64"),
    "a layer more": (
        lambda o: o["model"].append(nn.Linear(2, 2)),
        "missing from the checkpoint: model/3.weight",
    ),
    "a layer fewer": (lambda o: o["model"].pop(2), "unexpected in the checkpoint: model/2.weight"),
    "another kind of object": (
        lambda o: o.update(model=5, train=nn.Linear(1, 1)),
        "missing .*: train/weight",
    ),
    "optimizer of fewer parameters": (
        lambda o: o.update(optimizer=torch.optim.AdamW(o["model"][0].parameters())),
        r"optimizer: parameters per group were \[6\] when saved, but are \[2\] in the live AdamW",
    ),
    "optimizer of more groups": (
        lambda o: o["optimizer"].add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        r"were \[6\] when saved, but are \[6, 1\]",
    ),
    "another optimizer": (
        lambda o: o.update(optimizer=torch.optim.SGD(o["model"].parameters(), lr=0.1, momentum=0.9)),
        "optimizer: .*AdamW.*SGD",
    ),
    "optimizer is no optimizer": (
        lambda o: o.update(counter=torch.optim.SGD(o["model"].parameters())),
        "counter: saved as something else than an optimizer",
    ),
    "tuple for a list": (
        lambda o: o["train"].update(list=(1, {"deep": "x"})),
        "saved as a list of 2, live a tuple",
    ),
    "dict for a value": (lambda o: o["train"].update(step={"a": 1}), "train/step: a dict here"),
    "tensor for a value": (lambda o: o["train"].update(step=torch.ones(1)), "train/step: a tensor here"),
    "array for a tensor": (lambda o: o["train"].update(t=np.ones(3)), "train/t: saved with no array"),
    "array of another dtype": (
        lambda o: o["train"].update(n=np.ones(4)),
        r"train/n: .*dtype <i8, live .* <f8",
    ),
    "array that is read-only": (
        lambda o: o["train"]["n"].setflags(write=False),
        "train/n: the live array is read-only",
    ),
    "meta tensor": (lambda o: o["model"].to("meta"), "model/0.weight: .*meta.*to_empty"),
    "sparse tensor": (
        lambda o: o["train"].update(t=torch.ones(3).to_sparse()),
        "train/t: .*sparse.*to_dense",
    ),
    "expanded tensor": (
        lambda o: o["train"].update(t=torch.ones(1).expand(3)),
        "train/t: the live tensor is expanded",
    ),
    "tied where it was not": (
        lambda o: setattr(o["model"][2], "bias", nn.Parameter(o["model"][0].weight.data.view(-1)[:2])),
        "share memory in the live objects, but were saved with values of their own",
    ),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_is_named_and_changes_nothing(tmp_path: Path, name: str) -> None:
    checkpoint = Store(tmp_path).save(everything(1))
    live = everything(2)
    change, message = MISMATCHES[name]
    change(live)
    before = None if name in ("meta tensor", "sparse tensor") else frozen(live)
    with pytest.raises(MismatchError, match=message) as caught:
        checkpoint.load_into(live)
    assert "nothing was changed" in str(caught.value)
    if before is not None:
        assert_same(frozen(live), before)


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save(everything(1))
    live = everything(2)
    live["model"] = nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    del live["train"]["t"]
    with pytest.raises(MismatchError) as caught:
        checkpoint.load_into(live)
    error = caught.value
    assert error.missing == ("model/3.weight", "model/3.bias")
    assert error.unexpected == ("train/t",)
    assert [text.split(":")[0] for text in error.different] == ["model/0.weight", "model/0.bias"]


def test_an_optimizer_of_a_subclass_fits(tmp_path: Path) -> None:
    class MyAdamW(torch.optim.AdamW):
        pass

    saved = everything(1)
    checkpoint = Store(tmp_path).save(saved)
    live = everything(2)
    live["optimizer"] = MyAdamW(live["model"].parameters())
    checkpoint.load_into(live)
    assert_same(live["optimizer"].state_dict(), saved["optimizer"].state_dict())


# --------------------------------------------------------------------------------- shared memory


def restored(tmp_path: Path, saved: list[torch.Tensor], live: list[torch.Tensor]) -> None:
    want = [tensor.clone() for tensor in saved]
    Store(tmp_path).save({"t": saved}).load_into({"t": live})
    assert_same(live, want)


def test_tied_into_untied_and_back(tmp_path: Path) -> None:
    a = torch.randn(3, 4)
    restored(tmp_path, [a, a], [torch.zeros(3, 4), torch.zeros(3, 4)])
    restored(tmp_path, [a, a.t()], [torch.zeros(3, 4), torch.zeros(4, 3)])
    b = torch.zeros(3, 4)
    restored(tmp_path, [a, a.clone()], [b, b])  # the same bytes fit into tied tensors
    restored(tmp_path, [a, a.t()], [b, b.t()])
    restored(tmp_path, [a.t(), a.t()], [b.t(), b.t()])
    restored(tmp_path, [a, a[1], a[:, 2], a.view(-1)], [b, b[1], b[:, 2], b.view(-1)])
    last = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    full = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    restored(tmp_path, [full, full], [last, last])


def test_views_that_share_without_their_base_are_all_filled(tmp_path: Path) -> None:
    base, other, shared = torch.randn(10), torch.zeros(10), torch.zeros(10)
    restored(tmp_path, [base, base[:5], base[:8]], [other, shared[:5], shared[:8]])
    shared.zero_()
    checkpoint = Store(tmp_path).save({"base": base, "views": [base[:5], base[:8]]})
    live = [shared[:5], shared[:8]]
    checkpoint.load_into({"views": live}, only="views")
    assert_same(live, [base[:5], base[:8]])


def test_interleaved_views_are_no_conflict(tmp_path: Path) -> None:
    a, b = torch.randn(4, 6), torch.zeros(4, 6)
    restored(tmp_path, [a[:, 0], a[:, 1], a[:, 2:4]], [b[:, 0], b[:, 1], b[:, 2:4]])
    restored(tmp_path, [torch.randn(4), torch.randn(4)], [b[:, 0], b[:, 1]])


@pytest.mark.parametrize(
    "live",
    [
        lambda b: [b, b],
        lambda b: [b, b.t()],
        lambda b: [b.t(), b.t()],
        lambda b: [b, b.view(-1)[:9].view(3, 3).flip(0).flip(0)] and [b, b[:]],
    ],
)
def test_different_values_never_go_into_one_memory(tmp_path: Path, live: Any) -> None:
    b = torch.zeros(3, 3)
    checkpoint = Store(tmp_path).save({"t": [torch.randn(3, 3), torch.randn(3, 3)]})
    with pytest.raises(MismatchError, match=r"t/1 and t/0 share memory"):
        checkpoint.load_into({"t": live(b)})
    assert_same(b, torch.zeros(3, 3))


def test_a_transposed_tie_is_not_a_plain_tie(tmp_path: Path) -> None:
    a, b = torch.randn(3, 3), torch.zeros(3, 3)
    with pytest.raises(MismatchError, match=r"share memory"):
        Store(tmp_path).save({"t": [a, a.t()]}).load_into({"t": [b, b]})
    with pytest.raises(MismatchError, match=r"share memory"):
        Store(tmp_path).save({"t": [a, a]}).load_into({"t": [b, b.t()]})
    assert_same(b, torch.zeros(3, 3))


def test_conjugated_and_negated_live_tensors(tmp_path: Path) -> None:
    values = torch.randn(3, dtype=torch.complex64)
    restored(tmp_path, [values], [torch.zeros(3, dtype=torch.complex64).conj()])
    restored(tmp_path, [values.imag.clone()], [torch.zeros(3, dtype=torch.complex64).conj().imag])


# ----------------------------------------------------------------------------------- plain values


def test_plain_values_in_dicts_and_lists_are_set_in_place(tmp_path: Path) -> None:
    saved = {
        "a": {
            "x": 1,
            "y": [2, {"z": "three"}],
            5: None,
            ("t",): b"b",
            "s": {1, 2},
            "t": torch.ones(2),
            "late": 1.5,
        }
    }
    checkpoint = Store(tmp_path).save(saved)
    live = {
        "a": {"x": 0, "y": [0, {"z": ""}], 5: 1, ("t",): b"", "s": set(), "t": None, "late": torch.tensor}
    }
    inner = live["a"]["y"]
    checkpoint.load_into(live)
    assert_same(live, saved)
    assert live["a"]["y"] is inner


def test_arrays_are_filled_in_place(tmp_path: Path) -> None:
    saved = {
        "n": [
            np.arange(6.0).reshape(2, 3),
            np.array(7),
            np.zeros((0, 2)),
            np.array(["a", "bc"]),
            np.arange(4, dtype=">i2"),
        ]
    }
    live = {
        "n": [
            np.zeros((2, 3)),
            np.array(0),
            np.zeros((0, 2)),
            np.array(["x", "yz"]),
            np.zeros(4, dtype=">i2"),
        ]
    }
    views = list(live["n"])
    live["n"][0] = np.zeros((3, 2)).T
    views[0] = live["n"][0]
    Store(tmp_path).save(saved).load_into(live)
    assert_same(live, saved)
    assert all(a is b for a, b in zip(views, live["n"], strict=True))


def test_tuples_must_hold_the_same_plain_values(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save({"a": (1, torch.ones(2), float("nan"))})
    live = (1, torch.zeros(2), float("nan"))
    checkpoint.load_into({"a": live})
    assert_same(live[1], torch.ones(2))
    with pytest.raises(MismatchError, match=r"a/0: saved with another value than the live 2"):
        checkpoint.load_into({"a": (2, torch.zeros(2), float("nan"))})


def test_only_restores_a_part(tmp_path: Path) -> None:
    saved, live = everything(1), everything(2)
    checkpoint = Store(tmp_path).save(saved)
    optimizer = frozen(live["optimizer"])
    checkpoint.load_into({"model": live["model"]}, only="model")
    assert_same(frozen(live["model"]), frozen(saved["model"]))
    assert_same(frozen(live["optimizer"]), optimizer)
    with pytest.raises(UsageError, match=r"matches nothing"):
        checkpoint.load_into({"modle": live["model"]}, only="modle")
    with pytest.raises(MismatchError, match=r"unexpected in the checkpoint: optimizer"):
        checkpoint.load_into({"model": live["model"]})


# ------------------------------------------------------------------------------- objects that raise


def test_an_object_that_refuses_leaves_all_as_it_was(tmp_path: Path) -> None:
    saved = {**everything(1), "zz": Refuses(1)}
    checkpoint = Store(tmp_path).save(saved)
    live = {**everything(2), "zz": Refuses(0)}
    before = frozen({k: v for k, v in live.items() if k != "zz"})
    with pytest.raises(RestoreError, match=r"zz: Refuses.load_state_dict .*not this one") as caught:
        checkpoint.load_into(live)
    assert isinstance(caught.value.__cause__, ValueError)
    assert_same(frozen({k: v for k, v in live.items() if k != "zz"}), before)


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), AttributeError("x"), RuntimeError("x")])
def test_an_object_that_cannot_say_its_state_is_no_damage(tmp_path: Path, error: Exception) -> None:
    class Broken(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise error

    store = Store(tmp_path)
    store.save({"model": nn.Linear(2, 2), "n": Counter()})
    with pytest.raises(RestoreError, match=r"model: Broken.state_dict raised"):
        store.load_latest_into({"model": Broken(2, 2), "n": Counter()})
    assert len(store.list()) == 1, "it was not set aside"


class _Celsius:
    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


def test_a_missing_codec_is_met_before_anything_is_changed(tmp_path: Path) -> None:
    register_codec(_Celsius, "celsius", lambda c: c.degrees, _Celsius)
    try:
        checkpoint = Store(tmp_path).save({"model": nn.Linear(2, 2), "train": {"t": _Celsius(3.0)}})
    finally:
        leaf.codecs_by_name.clear()
        leaf.codecs_by_type.clear()
    live = {"model": nn.Linear(2, 2), "train": {"t": None}}
    before = frozen(live)
    with pytest.raises(UnsupportedTypeError, match=r"'celsius', which is not registered"):
        checkpoint.load_into(live)
    assert_same(frozen(live), before)


# ------------------------------------------------------------------------------------------ damage


def damage(checkpoint: Checkpoint, file: str, offset: int = -1) -> None:
    path = checkpoint.path / file
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damage_names_what_was_overwritten_and_the_older_one_repairs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)
    old = everything(1)
    store.save(old, step=1)
    newer = store.save(everything(3), step=2)
    damage(newer, "optimizer.safetensors")
    live = everything(2)
    with pytest.raises(DigestError, match=r"optimizer") as caught:
        newer.load_into(live)
    overwritten = caught.value.overwritten
    assert "counter" in overwritten
    assert any(name.startswith("model/") for name in overwritten)
    assert "mixed state" in str(caught.value)
    for name, before, after in (("model", frozen(everything(2)["model"]), frozen(live["model"])),):
        changed = {f"{name}/{key}" for key in before if difference(before[key], after[key])}
        assert changed <= set(overwritten)
    with caplog.at_level(logging.ERROR):
        taken = store.load_latest_into(live)
    assert taken is not None
    assert taken.step == 1
    assert_same(frozen(live), frozen(old))
    assert "checkpoint_1" in caplog.text
    assert "optimizer.safetensors" in caplog.text
    assert [c.name for c in store.list()] == ["checkpoint_0"]
    assert (tmp_path / ".keepstep/damaged/checkpoint_1/optimizer.safetensors").exists(), "nothing is deleted"
    assert store.save(live).name == "checkpoint_2", "its number is not given again"


def test_damage_in_plain_values_is_met_before_anything_is_changed(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save(everything(1))
    damage(checkpoint, "state.json", 200)
    live = everything(2)
    before = frozen(live)
    with pytest.raises(DigestError) as caught:
        checkpoint.load_into(live)
    assert caught.value.overwritten == ()
    assert_same(frozen(live), before)


def test_when_all_are_damaged_it_is_an_error_every_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(2):
        damage(store.save({"w": torch.ones(3)}, step=step), "w.safetensors")
    for _ in range(2):  # a supervisor starts the run again: it must not start over in silence
        with pytest.raises(NoValidCheckpointError, match=r"checkpoint_1"):
            Store(tmp_path).load_latest_into({"w": torch.zeros(3)})


def test_an_empty_store_is_a_first_start(tmp_path: Path) -> None:
    assert Store(tmp_path / "none").load_latest_into({"w": torch.zeros(3)}) is None
    assert not (tmp_path / "none").exists()


def test_a_mismatch_sets_nothing_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"w": torch.ones(3)})
    with pytest.raises(MismatchError):
        store.load_latest_into({"w": torch.ones(4)})
    assert len(store.list()) == 1


def test_lineage_goes_on_after_a_resume(tmp_path: Path) -> None:
    first = Store(tmp_path).save({"w": torch.ones(1)})
    store = Store(tmp_path)
    store.load_latest_into({"w": torch.zeros(1)})
    second = store.save({"w": torch.ones(1)})
    assert second.manifest.run == first.manifest.run
    assert (first.manifest.attempt, second.manifest.attempt) == (1, 2)
    assert second.manifest.parent == first.manifest.id


def test_missing_file_is_named(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save({"w": torch.ones(3)})
    (checkpoint.path / "w.safetensors").unlink()
    for load in (checkpoint.load, lambda: checkpoint.load_into({"w": torch.zeros(3)})):
        with pytest.raises(MissingFileError, match=r"w.safetensors"):
            load()


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no such directory"):
        Checkpoint.open(tmp_path / "nothing")
    with pytest.raises(CheckpointNotFoundError, match=r"no manifest.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("only", ["model", ["model/0.*", "train/step"], "optimizer/state.0.exp_avg"])
def test_a_part_loads_alone(tmp_path: Path, only: Any) -> None:
    saved = everything(1)
    loaded = Store(tmp_path).save(saved).load(only=only)
    if only == "model":
        assert_same(loaded, {"model": saved["model"].state_dict()})
    elif isinstance(only, list):
        assert list(loaded["model"]) == ["0.weight", "0.bias"]
        assert loaded["train"] == {"step": 1}
    else:
        assert_same(
            loaded["optimizer"]["state"][0]["exp_avg"], saved["optimizer"].state_dict()["state"][0]["exp_avg"]
        )


def test_a_part_is_not_stopped_by_damage_elsewhere(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save(everything(1))
    damage(checkpoint, "optimizer.safetensors")
    checkpoint.load(only="model")
    with pytest.raises(DamagedCheckpointError):
        checkpoint.load()
    checkpoint.load(verify=False)


def test_plain_lists_and_tuples_take_what_was_saved_whatever_their_length(tmp_path: Path) -> None:
    losses = [0.9, 0.8, 0.7]
    checkpoint = Store(tmp_path).save(
        {"losses": losses, "rng": random.Random(1).getstate(), "nested": [[1, 2]]}
    )
    live_losses: list[float] = []
    live = {"losses": live_losses, "rng": random.Random(2).getstate(), "nested": [[0]]}
    checkpoint.load_into(live)
    assert live["losses"] is live_losses
    assert live_losses == losses
    assert live["rng"] == random.Random(1).getstate()
    assert live["nested"] == [[1, 2]]


def test_a_list_of_tensors_must_have_the_saved_length(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save({"shadow": [torch.ones(2), torch.ones(2)]})
    live = {"shadow": [torch.zeros(2)]}
    with pytest.raises(MismatchError, match="a list of 2"):
        checkpoint.load_into(live)
    assert live["shadow"][0].tolist() == [0.0, 0.0]


def test_views_that_overlap_in_part_come_back_into_the_same_memory(tmp_path: Path) -> None:
    base = torch.arange(10.0)
    checkpoint = Store(tmp_path).save({"left": base[:6], "right": base[4:]})
    live = torch.zeros(10)
    checkpoint.load_into({"left": live[:6], "right": live[4:]})
    assert live.tolist() == base.tolist()


def test_views_that_overlap_in_part_and_were_saved_with_other_values_are_refused(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save({"left": torch.zeros(6), "right": torch.ones(6)})
    live = torch.full((10,), 7.0)
    with pytest.raises(MismatchError, match="share memory"):
        checkpoint.load_into({"left": live[:6], "right": live[4:]})
    assert live.tolist() == [7.0] * 10
