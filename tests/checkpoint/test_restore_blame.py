"""What goes wrong in a restore is blamed on who did it: the bytes, the system, the objects, their code."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from keepstep import Store
from keepstep.checkpoint import version
from keepstep.checkpoint.engine import save_directory
from keepstep.errors import (
    CheckpointNotFoundError,
    DirectoryNotOursError,
    MismatchError,
    RestoreError,
    StoreError,
)
from keepstep.tree import register_codec
from keepstep.tree.leaf import codecs_by_name, codecs_by_type


class Point(namedtuple("Point", "x y")):  # noqa: PYI024
    """A tuple with a codec."""


@pytest.fixture
def codec() -> Any:
    behaviour = {"decode": lambda values: Point(*values)}
    register_codec(Point, "point", list, lambda values: behaviour["decode"](values))  # noqa: PLW0108
    yield behaviour
    del codecs_by_name["point"], codecs_by_type[Point]


class Registry(dict[str, int]):
    """A dict with a state of its own."""

    def state_dict(self) -> dict[str, int]:
        return {"sum": sum(self.values())}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self["loaded"] = state["sum"]


# ------------------------------------------------------------------------------------ who is to blame


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ENOMEM])
def test_a_system_that_refuses_sets_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store = Store(tmp_path)
    for step in range(2):
        store.save({"w": torch.full((3,), float(step))}, step=step)
    real = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if str(path).endswith("w.safetensors"):
            raise OSError(code, os.strerror(code))
        return real(path, *rest, **more)

    live = {"w": torch.zeros(3)}
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(StoreError, match=os.strerror(code)):
            store.load_latest_into(live)
    assert [checkpoint.step for checkpoint in store.list()] == [0, 1]
    restored = store.load_latest_into(live)
    assert restored is not None
    assert restored.step == 1


def test_a_failing_disk_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    for step in range(2):
        store.save({"w": torch.full((3,), float(step))}, step=step)
    real = os.preadv

    def preadv(fd: int, *rest: Any) -> int:
        if "checkpoint_1" in str(Path(f"/proc/self/fd/{fd}").readlink()):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, *rest)

    monkeypatch.setattr(os, "preadv", preadv)
    restored = store.load_latest_into({"w": torch.zeros(3)})
    assert restored is not None
    assert restored.step == 0


def test_a_lazy_module_is_a_mismatch(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"m": nn.Linear(2, 3)})
    with pytest.raises(MismatchError, match=r"m/weight.*run one batch"):
        store.load_latest_into({"m": nn.LazyLinear(3)})
    assert len(store.list()) == 1


def test_a_codec_that_fails_is_no_damage(tmp_path: Path, codec: Any) -> None:
    store = Store(tmp_path)
    store.save({"p": Point(1, 2)})

    def refuse(_: Any) -> None:
        raise TypeError("Point takes three values now")

    codec["decode"] = refuse
    with pytest.raises(RestoreError, match="three values"):
        store.load_latest_into({"p": None})
    assert len(store.list()) == 1


# ---------------------------------------------------------------------- what was saved goes back in


def test_values_whose_class_looks_like_a_container(tmp_path: Path, codec: Any) -> None:
    live = {"size": torch.Size([2, 3]), "point": Point(1, 2), "registry": Registry(a=4)}
    checkpoint = Store(tmp_path).save(live)
    live["size"], live["point"] = torch.Size([9]), Point(0, 0)
    checkpoint.load_into(live)
    assert live["size"] == torch.Size([2, 3])
    assert live["point"] == Point(1, 2)
    assert live["registry"] == {"a": 4, "loaded": 4}


def test_inference_tensors_take_their_values(tmp_path: Path) -> None:
    with torch.inference_mode():
        live = {"dense": torch.ones(3), "scattered": torch.ones(2, 3).t()}
    checkpoint = Store(tmp_path).save(live)
    with torch.inference_mode():
        live["dense"].zero_()
        live["scattered"].zero_()
    checkpoint.load_into(live)
    assert live["dense"].sum() + live["scattered"].sum() == 9


@pytest.mark.parametrize("transposed", [False, True])
def test_backward_through_a_restored_tensor_is_refused(tmp_path: Path, transposed: bool) -> None:
    """Its graph remembers the value from before; a gradient made of the new one would be silently wrong."""
    memory = torch.ones(2, 3)
    weight = (memory.t() if transposed else memory).requires_grad_()
    checkpoint = Store(tmp_path).save({"w": torch.full(tuple(weight.shape), 5.0)})
    loss = (weight * weight).sum()
    checkpoint.load_into({"w": weight})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_versions_of_modules_survive_a_roll_back(tmp_path: Path) -> None:
    class Copying(nn.BatchNorm1d):
        seen: Any = None

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            state = super().state_dict(*args, **kwargs)
            for key in state:
                state[key] = state[key].clone()
            return state

        def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            self.seen = metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    class Refuses:
        def state_dict(self) -> int:
            return 1

        def load_state_dict(self, state: int) -> None:
            raise ValueError("no")

    live = {"m": Copying(2), "r": Refuses()}
    checkpoint = Store(tmp_path).save(live)
    with pytest.raises(RestoreError) as caught:
        checkpoint.load_into(live)
    assert live["m"].seen == 2
    assert any("earlier state" in note for note in caught.value.__notes__), "Refuses refuses that as well"


def test_a_late_refusal_says_that_the_state_is_mixed(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    checkpoint = Store(tmp_path).save({"m": module})

    def refuse(*_: Any) -> None:
        raise ValueError("after all, no")

    module.register_load_state_dict_post_hook(refuse)
    with pytest.raises(RestoreError, match="after all, no") as caught:
        checkpoint.load_into({"m": module})
    assert "mixed state" in caught.value.__notes__[0]


# ------------------------------------------------------------------------------- gone, or another


def test_a_checkpoint_that_was_replaced_is_not_loaded_in_its_stead(tmp_path: Path) -> None:
    first = save_directory(tmp_path / "best", {"x": 1}, step=1)
    save_directory(tmp_path / "best", {"x": 2}, step=2)
    with pytest.raises(CheckpointNotFoundError, match=r"another checkpoint by now .step 2, this one .*1"):
        first.load()


def test_a_checkpoint_that_was_deleted_is_gone_not_damaged(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = store.save({"x": 1})
    store.delete(checkpoint)
    with pytest.raises(CheckpointNotFoundError, match="is gone"):
        checkpoint.load_into({"x": 0})


def test_what_is_dropped_during_a_restore_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader beside a run that keeps its newest checkpoint only."""
    store = Store(tmp_path)
    store.save({"x": 1}, step=1)
    real = version.load_into

    def dropped_meanwhile(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(version, "load_into", real)
        writer = Store(tmp_path)
        writer.save({"x": 2}, step=2)
        shutil.rmtree(tmp_path / "checkpoint_0")
        real(*args, **kwargs)

    monkeypatch.setattr(version, "load_into", dropped_meanwhile)
    live = {"x": 0}
    store.load_latest_into(live)
    assert live == {"x": 2}


def test_messages_begin_with_words_and_say_what_was_done(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DirectoryNotOursError) as caught:
        save_directory(tmp_path, {"x": 1})
    assert str(caught.value).startswith(str(tmp_path))
    assert caught.value.errno == errno.EEXIST
