"""What did not change since the checkpoint before is linked, never written again, and never stale."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.checkpoint.faults import FaultyFiles

from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.saving import staging
from keepstep.checkpoint.saving.staging import dense_bytes
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.files import LocalFiles

MIB = 1 << 20


class Adapted(torch.nn.Module):
    """A frozen base of 2 MiB beside a small adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.nn.Linear(512, 1024)
        self.base.requires_grad_(False)
        self.adapter = torch.nn.Linear(512, 4)


def train(model: Adapted) -> None:
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(1)


def inodes(checkpoint: Checkpoint) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in checkpoint.path.iterdir()}


def linked(first: Checkpoint, second: Checkpoint) -> set[str]:
    """Files of the second that are links to files of the first."""
    before = set(inodes(first).values())
    return {name for name, inode in inodes(second).items() if inode in before}


def same_as(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    assert checkpoint.verify().sound
    assert_same(dict(checkpoint.load()["model"]), dict(model.state_dict()))


SAVES: dict[str, Callable[[Store, Any], Checkpoint]] = {
    "save": lambda store, state: store.save(state),
    "awaited": lambda store, state: store.save_in_background(state).wait(),
    "overlapped": lambda store, state: store.save_in_background(state, staging="overlapped").wait(),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_frozen_base_is_written_once(tmp_path: Path, save: Callable[[Store, Any], Checkpoint]) -> None:
    model, store = Adapted(), Store(tmp_path)
    first = save(store, {"model": model})
    for _ in range(3):
        train(model)
        checkpoint = save(store, {"model": model})
        assert linked(first, checkpoint) == {"model-00002-of-00002.safetensors"}
        same_as(checkpoint, model)


def test_an_idle_optimizer_is_linked_whole(tmp_path: Path) -> None:
    moments, weights = torch.randn(MIB), torch.randn(MIB)
    store = Store(tmp_path)
    first = store.save({"weights": {"w": weights}, "optimizer": {"m": moments}})
    weights += 1
    second = store.save({"weights": {"w": weights}, "optimizer": {"m": moments}})
    assert linked(first, second) == {"optimizer.safetensors"}
    assert_same(second.load()["weights"]["w"], weights)


IN_PLACE_WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "one element": lambda w: w.view(-1)[-1:].zero_(),
    "data": lambda w: w.data.view(-1)[7:8].fill_(3),
    "numpy": lambda w: w.numpy().__setitem__((0, 0), 5.0),
    "same values elsewhere": lambda w: w.set_(w.clone() + 1),
}


@pytest.mark.parametrize("write", IN_PLACE_WRITES.values(), ids=IN_PLACE_WRITES)
def test_a_write_to_what_seemed_to_rest_is_never_missed(
    tmp_path: Path, write: Callable[[torch.Tensor], Any]
) -> None:
    w, store = torch.randn(512, 1024), Store(tmp_path)
    for _ in range(3):
        store.save({"model": {"w": w, "b": torch.ones(2)}})
    write(w)
    changed = store.save({"model": {"w": w, "b": torch.ones(2)}})
    assert torch.equal(changed.load()["model"]["w"], w)
    again = store.save({"model": {"w": w, "b": torch.ones(2)}})
    assert torch.equal(again.load()["model"]["w"], w)
    assert linked(changed, again) == {"model.safetensors"}


def test_values_that_come_back_are_not_taken_for_unchanged(tmp_path: Path) -> None:
    """Only the last checkpoint is linked to, and by its digests."""
    w, store = torch.zeros(512, 1024), Store(tmp_path)
    for value in (0.0, 1.0, 0.0, 0.0):
        checkpoint = store.save({"w": {"w": w.fill_(value)}})
        assert checkpoint.load()["w"]["w"].unique().tolist() == [value]


def test_checkpoints_go_in_any_order(tmp_path: Path) -> None:
    model, store = Adapted(), Store(tmp_path)
    for _ in range(5):
        train(model)
        store.save({"model": model})
    for number in (0, 3, 1, 4):
        store.delete(f"checkpoint_{number}")
        assert all(report.sound for report in store.verify())
    train(model)
    checkpoint = store.save({"model": model})  # the one it would have linked to is gone
    same_as(checkpoint, model)


def test_retention_drops_links_and_not_what_they_share(tmp_path: Path) -> None:
    model, store = Adapted(), Store(tmp_path, retention=Retention(keep_last=1))
    for _ in range(4):
        train(model)
        store.save({"model": model})
    (only,) = store.list()
    same_as(only, model)


def test_a_copied_directory_is_whole_by_itself(tmp_path: Path) -> None:
    model, store = Adapted(), Store(tmp_path / "store")
    store.save({"model": model})
    train(model)
    shutil.copytree(store.save({"model": model}).path, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "store")
    same_as(Checkpoint.open(tmp_path / "elsewhere"), model)


def test_a_resumed_run_links_to_what_it_resumed_from(tmp_path: Path) -> None:
    model = Adapted()
    first = Store(tmp_path).save({"model": model})
    store, fresh = Store(tmp_path), Adapted()
    store.load_latest_into({"model": fresh})
    train(fresh)
    second = store.save({"model": fresh})
    assert linked(first, second) == {"model-00002-of-00002.safetensors"}
    same_as(second, fresh)


@pytest.mark.parametrize("spoil", ["gone", "shorter", "a link"])
def test_what_cannot_be_linked_is_written(tmp_path: Path, spoil: str) -> None:
    model, store = Adapted(), Store(tmp_path)
    first = store.save({"model": model})
    base = first.path / "model-00002-of-00002.safetensors"
    if spoil == "gone":
        base.unlink()
    elif spoil == "shorter":
        base.write_bytes(b"short")
    else:
        base.rename(tmp_path / "moved")
        base.symlink_to(tmp_path / "moved")
    train(model)
    second = store.save({"model": model})
    assert not linked(first, second)
    same_as(second, model)


class NoLinks(FaultyFiles):
    """A file system without hard links copies; the copy is a file of its own."""

    def link(self, source: Path, target: Path) -> None:
        shutil.copy2(source, target)


def test_without_hard_links_files_are_copied(tmp_path: Path) -> None:
    model, store = Adapted(), Store(tmp_path, files=NoLinks())
    first = store.save({"model": model})
    train(model)
    second = store.save({"model": model})
    assert not linked(first, second)
    same_as(second, model)


def test_links_are_copies_where_the_system_refuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    source = tmp_path / "a"
    source.write_bytes(b"bytes")
    LocalFiles().link(source, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"bytes"
    assert (tmp_path / "b").stat().st_ino != source.stat().st_ino


def test_tensors_that_stop_changing_move_to_a_file_of_their_own_once(tmp_path: Path) -> None:
    resting, busy = torch.randn(512, 1024), torch.randn(512, 512)
    store, sizes, made = Store(tmp_path), [], []
    for _ in range(7):
        busy += 1
        made.append(store.save({"model": {"resting": resting, "busy": busy}}))
        before = set(inodes(made[-2]).values()) if len(made) > 1 else set()
        new = [p.stat().st_size for p in made[-1].path.glob("*.safetensors") if p.stat().st_ino not in before]
        sizes.append(round(sum(new) / MIB))
        assert_same(dict(made[-1].load()["model"]), {"resting": resting, "busy": busy})
    assert sizes == [3, 3, 3, 3, 1, 1, 1], sizes  # apart from the fourth on, linked from the fifth
    resting += 1
    woken = store.save({"model": {"resting": resting, "busy": busy}})
    assert_same(dict(woken.load()["model"]), {"resting": resting, "busy": busy})


def test_nothing_is_linked_to_damage_that_was_found(tmp_path: Path) -> None:
    """All checkpoints share the file; the next one must not share what is wrong with it."""
    store, w = Store(tmp_path), torch.randn(MIB // 4)
    for _ in range(3):
        checkpoint = store.save({"w": w})
    with (checkpoint.path / "w.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"rot")
    assert not any(report.sound for report in store.verify())
    assert_same(store.save({"w": w}).load(), {"w": w})


def test_dense_copies_of_what_rests_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not lie densely is made dense to be compared; all of a frozen base may be too much."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal most
        made = dense_bytes(tensor)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    store, state = Store(tmp_path), {"base": [torch.rand(512, 1024 + n).t() for n in range(12)]}
    first = store.save(state)
    monkeypatch.setattr(staging, "dense_bytes", counted)
    second = store.save(state)
    assert linked(first, second) == {"base.safetensors"}
    assert len(alive) >= 12
    assert most <= 4


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_one_element_of_any_stride_is_compared_and_loaded(tmp_path: Path, save: Any) -> None:
    """Torch calls it contiguous."""

    def state(value: float) -> dict[str, torch.Tensor]:
        odd = torch.full((2,), value, dtype=torch.complex64).real[::2]
        assert (odd.stride(), odd.is_contiguous()) == ((4,), True)
        return {"odd": odd, "scalar": odd[0], "base": torch.full((MIB,), value)}

    store, saved = Store(tmp_path), {"m": state(2.0)}
    first, second = save(store, saved), save(store, saved)
    assert linked(first, second) == {"m.safetensors"}
    live = {"m": state(-1.0)}
    store.load_latest_into(live)
    assert_same(live, saved)
