"""Store: naming, finding, background saves, retention, and what the disk or the user may do wrong."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.checkpoint.faults import IO_ERROR, NO_PERMISSION, NO_SPACE, READ_ONLY, FaultyFiles
from tests.forked import in_fork

from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.saving.staging import BLOCK_BYTES
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    BackgroundSaveError,
    CheckpointNotFoundError,
    DirectoryNotOursError,
    NoSpaceError,
    StateError,
    StoreError,
    StoreReadOnlyError,
    UnsupportedTypeError,
    UsageError,
)
from keepstep.files import LocalFiles

STATE: dict[str, Any] = {"w": torch.arange(10.0), "n": 1}


def names(store: Store) -> list[str]:
    return [checkpoint.name for checkpoint in store.list()]


def test_checkpoints_are_numbered_and_found(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs" / "a")
    assert store.latest() is None
    assert store.list() == []
    for step in range(12):
        store.save(
            STATE,
            step=step,
            epoch=step // 5,
            metrics={"loss": 12.0 - step},
            tags=("odd",) if step % 2 else (),
        )
    assert names(store) == [f"checkpoint_{n}" for n in range(12)]
    latest = store.latest()
    assert latest is not None
    assert (latest.name, latest.step, latest.epoch, latest.metrics, latest.tags) == (
        "checkpoint_11", 11, 2, {"loss": 1.0}, ("odd",),
    )  # fmt: skip
    assert store.get("checkpoint_3").step == 3
    assert store.best("loss").step == 11  # type: ignore[union-attr]
    assert store.best("loss", "max").step == 0  # type: ignore[union-attr]
    assert store.best("accuracy") is None
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint 'checkpoint_99' in .*checkpoint_11"):
        store.get("checkpoint_99")
    with pytest.raises(UsageError, match=r"mode is 'lowest'; allowed: 'min' or 'max'"):
        store.best("loss", "lowest")  # type: ignore[arg-type]


def test_what_is_said_of_a_checkpoint_is_kept(tmp_path: Path) -> None:
    checkpoint = Store(tmp_path).save(
        STATE,
        step=np.int64(5),  # type: ignore[arg-type]
        metrics={
            "loss": torch.tensor(0.5),
            "acc": np.float32(0.25),
            "nan": float("nan"),
            "inf": float("-inf"),
            "ok": True,
            "note": "ä",
            "n": 7,
        },
        tags="best",
        pinned=True,
    )
    read = Checkpoint.open(checkpoint.path)
    assert read.step == 5
    assert read.tags == ("best",)
    assert read.pinned
    assert_same(
        dict(read.metrics),
        {
            "loss": 0.5,
            "acc": 0.25,
            "nan": float("nan"),
            "inf": float("-inf"),
            "ok": True,
            "note": "ä",
            "n": 7,
        },
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step": 1.5}, "step is 1.5; expected a whole number or None"),
        ({"epoch": True}, "epoch is True"),
        ({"metrics": {"a": [1]}}, r"metric 'a' is \[1\], a list"),
        ({"metrics": {"a": torch.ones(2)}}, r"metric 'a' has the shape \(2,\)"),
        ({"metrics": {1: 2.0}}, "a metric's name is 1"),
        ({"tags": ["a", ""]}, "expected non-empty strings"),
        ({"tags": [1]}, "expected non-empty strings"),
    ],
)
def test_wrong_descriptions_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Store(tmp_path / "s").save(STATE, **wrong)
    assert not (tmp_path / "s").exists()


def test_a_state_that_cannot_be_saved_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(STATE)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for save in (store.save, store.save_in_background):
        with pytest.raises(UnsupportedTypeError, match=r"'x'"):
            save({"w": torch.ones(3), "x": object()})
        with pytest.raises(StateError):
            save({"w": torch.ones(3, device="meta")})
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert store.save(STATE).name == "checkpoint_1"


# ------------------------------------------------------------------------------------- background


class SlowFiles(LocalFiles):
    """Waits before it publishes."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def rename(self, source: Path, target: Path) -> None:
        assert self.go.wait(20)
        super().rename(source, target)


def test_a_background_save_returns_before_it_is_committed(tmp_path: Path) -> None:
    files = SlowFiles()
    store = Store(tmp_path, files=files)
    pending = store.save_in_background(STATE, step=1)
    assert store.busy
    assert not pending.done()
    assert store.latest() is None
    assert 0 <= pending.blocked_s < 20
    files.go.set()
    checkpoint = pending.wait()
    assert checkpoint.step == 1
    assert pending.done()
    assert not store.busy
    assert_same(checkpoint.load(), STATE)
    store.wait()


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    files = SlowFiles()
    store = Store(tmp_path, files=files)
    store.save_in_background(STATE, step=1)
    threading.Timer(0.1, files.go.set).start()
    store.save_in_background(STATE, step=2)
    store.save(STATE, step=3)
    assert [c.step for c in store.list()] == [1, 2, 3]


def failing(root: Path, error: OSError = IO_ERROR) -> Store:
    """A store whose next background save fails behind the caller's back."""
    files = FaultyFiles()
    store = Store(root, files=files)
    store.save(STATE)
    files.at = len(files.log) + 6
    files.error = error
    return store


def test_a_failure_behind_the_back_is_raised_at_the_next_call(tmp_path: Path) -> None:
    calls: list[Any] = [
        lambda s: s.wait(),
        lambda s: s.save(STATE),
        lambda s: s.save_in_background(STATE),
        lambda s: s.load_latest_into({"w": torch.zeros(10), "n": 0}),
    ]
    for number, call in enumerate(calls):
        store = failing(tmp_path / str(number))
        store.save_in_background(STATE)
        with pytest.raises(BackgroundSaveError, match=r"Input/output error") as caught:
            call(store)
        assert isinstance(caught.value.__cause__, StoreError)
        store.wait()
        store.save(STATE)
        assert len(store.list()) == 2


def test_a_failure_that_was_told_is_not_told_again(tmp_path: Path) -> None:
    store = failing(tmp_path, NO_SPACE)
    pending = store.save_in_background(STATE)
    for _ in range(2):
        with pytest.raises(BackgroundSaveError) as caught:
            pending.wait()
    assert isinstance(caught.value.__cause__, NoSpaceError)
    store.save(STATE)


def test_a_state_larger_than_the_budget_goes_through(tmp_path: Path) -> None:
    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)
    state = {"w": torch.randint(0, 255, (5 * BLOCK_BYTES + 123,), dtype=torch.uint8)}
    kept = {"w": state["w"].clone()}
    pending = store.save_in_background(state)
    state["w"].zero_()
    assert_same(pending.wait().load(), kept)
    with pytest.raises(UsageError, match=r"memory_budget_bytes is 100; expected .* at least 16777216"):
        Store(tmp_path, memory_budget_bytes=100)


def test_failed_copies_do_not_use_up_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, memory_budget_bytes=2 * BLOCK_BYTES)
    with monkeypatch.context() as broken:

        def fail(*_: Any) -> None:
            raise MemoryError("no memory to copy to")

        broken.setattr("keepstep.checkpoint.saving.staging.TensorBytes.copy_into", fail)
        for _ in range(5):
            for save in (store.save, store.save_in_background):
                with pytest.raises(MemoryError):
                    save(STATE)
    assert_same(store.save_in_background(STATE).wait().load(), STATE)
    assert_same(store.save(STATE).load(), STATE)


def test_threads_share_a_store_and_stores_share_a_path(tmp_path: Path) -> None:
    stores = [Store(tmp_path), Store(tmp_path)]
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for step in range(5):
                (stores[index % 2].save if index < 2 else stores[index % 2].save_in_background)(
                    {"who": index, "step": step}
                )
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for store in stores:
        store.wait()
    assert errors == []
    loaded = [checkpoint.load() for checkpoint in Store(tmp_path).list()]
    assert sorted((s["who"], s["step"]) for s in loaded) == [
        (who, step) for who in range(4) for step in range(5)
    ]


def test_a_store_holds_no_memory_of_what_it_saved(tmp_path: Path) -> None:
    store = Store(tmp_path)
    freed = []

    class Watched:
        def state_dict(self) -> dict[str, Any]:
            return {"x": 1}

        def load_state_dict(self, state: Any) -> None: ...

        def __del__(self) -> None:
            freed.append(True)

    watched = Watched()
    store.save_in_background({"a": watched}).wait()
    del watched
    gc.collect()
    assert freed


def test_a_forked_child_saves_for_itself(tmp_path: Path) -> None:
    store = Store(tmp_path / "a")
    store.save(STATE)
    assert in_fork(lambda: Store(tmp_path / "b").save(STATE)) == 0
    assert len(Store(tmp_path / "b").list()) == 1


# -------------------------------------------------------------------------------------- retention


def kept(tmp_path: Path, retention: Retention, count: int = 6, **more: Any) -> list[int | None]:
    store = Store(tmp_path, retention=retention)
    losses = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    for step in range(count):
        store.save(
            STATE, step=step, metrics={"loss": losses[step]}, **{k: step == v for k, v in more.items()}
        )
    assert list(tmp_path.glob("checkpoint_*")) != []
    assert not list((tmp_path / ".keepstep").rglob("*.safetensors")), "what was dropped is gone from the disk"
    return [checkpoint.step for checkpoint in store.list()]


def test_retention_is_applied_after_each_commit(tmp_path: Path) -> None:
    assert kept(tmp_path / "1", Retention(keep_last=2)) == [4, 5]
    assert kept(tmp_path / "2", Retention(keep_best=("loss", "min", 2))) == [1, 3, 5]
    assert kept(tmp_path / "3", Retention(keep_every_n_steps=2)) == [0, 2, 4, 5]
    assert kept(tmp_path / "4", Retention(keep_last=1, keep_best=("loss", "max", 1))) == [5]
    assert kept(tmp_path / "5", Retention(keep_last=1), pinned=2) == [2, 5]
    assert kept(tmp_path / "6", Retention()) == [0, 1, 2, 3, 4, 5]
    one = Store(tmp_path / "6").list()[0].bytes
    assert kept(tmp_path / "7", Retention(byte_budget=3 * one + 100)) == [3, 4, 5]
    assert kept(tmp_path / "8", Retention(byte_budget=1)) == [5]


def test_a_failed_deletion_does_not_fail_the_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Undeletable(LocalFiles):
        def remove_file(self, path: Path) -> None:
            raise OSError(*IO_ERROR.args)

    store = Store(tmp_path, retention=Retention(keep_last=1), files=Undeletable())
    store.save(STATE)
    with caplog.at_level(logging.WARNING):
        assert store.save(STATE).name == "checkpoint_1"
    assert "could not be deleted" in caplog.text


def test_delete(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, second, third = (store.save(STATE) for _ in range(3))
    store.delete(first)
    store.delete("checkpoint_1")
    assert names(store) == ["checkpoint_2"]
    for gone in (first, "checkpoint_1"):
        with pytest.raises(CheckpointNotFoundError):
            store.delete(gone)
    other = Store(tmp_path / "other")
    other.save(STATE), other.save(STATE), other.save(STATE)
    with pytest.raises(CheckpointNotFoundError, match=r"delete it through its own store"):
        other.delete(third)
    assert second.path.exists() is False


def test_delete_keeps_foreign_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    checkpoint = store.save(STATE)
    (checkpoint.path / "plot.png").write_text("mine")
    store.delete(checkpoint)
    assert store.list() == []
    assert (checkpoint.path / "plot.png").read_text() == "mine"
    assert [p.name for p in (checkpoint.path).iterdir()] == ["plot.png"]
    assert store.save(STATE).name == "checkpoint_1"


# ---------------------------------------------------------------------------- the disk and the user


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (NO_SPACE, NoSpaceError, "no space for saving .*Free some space"),
        (READ_ONLY, StoreReadOnlyError, "cannot write to .*Read-only file system.*permissions"),
        (NO_PERMISSION, StoreReadOnlyError, "cannot write to .*Permission denied"),
        (IO_ERROR, StoreError, "failed: Input/output error"),
    ],
)
def test_what_the_disk_refuses_is_explained(
    tmp_path: Path, error: OSError, kind: type[Exception], words: str, background: bool
) -> None:
    store = Store(tmp_path, files=FaultyFiles(at=0, error=error))
    with pytest.raises(kind, match=words) as caught:
        (store.save_in_background if background else store.save)(STATE)
    assert isinstance(caught.value.__cause__, OSError)
    store = Store(tmp_path / "b", files=FaultyFiles(at=10, error=error))
    with pytest.raises((kind, BackgroundSaveError)):
        (store.save_in_background(STATE).wait if background else lambda: store.save(STATE))()
    assert list((tmp_path / "b").glob("checkpoint_*")) == [] or Store(tmp_path / "b").latest() is not None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the fake covers it")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    with pytest.raises(StoreReadOnlyError):
        Store(tmp_path / "locked" / "store").save(STATE)
    store = Store(tmp_path / "was fine")
    store.save(STATE)
    store.path.chmod(0o555)
    with pytest.raises(StoreReadOnlyError):
        Store(store.path).save(STATE)
    assert Store(store.path).latest() is not None


def test_a_file_where_a_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError):
            Store(path).save(STATE)
    with pytest.raises(CheckpointNotFoundError, match=r"is a file"):
        Store(tmp_path / "file").list()
    assert (tmp_path / "file").read_text() == "mine"


def test_other_things_in_a_store_are_left_alone(tmp_path: Path) -> None:
    for name in (
        "checkpoint_x",
        "checkpoint_01",
        "checkpoint_3.bak",
        "my.tmp-notes",
        "notes.tmp-zzzzzzzzzzzz",
        "logs",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").write_text(name)
    (tmp_path / "checkpoint_7").mkdir()
    (tmp_path / "checkpoint_7" / "x").write_text("no manifest")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    store = Store(tmp_path, retention=Retention(keep_last=1))
    for _ in range(3):
        assert store.save(STATE).name.startswith("checkpoint_")
    assert set(before) <= {str(p) for p in tmp_path.rglob("*")}
    assert names(store) == ["checkpoint_10"]


def test_a_store_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.save(STATE)
    shutil.rmtree(tmp_path / "s")
    assert store.save(STATE).name == "checkpoint_0"
    shutil.rmtree(tmp_path / "s")
    assert Store(tmp_path / "s").save(STATE).name == "checkpoint_0"


def test_latest_passes_over_damage_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    for step in range(3):
        store.save(STATE, step=step)
    (tmp_path / "checkpoint_2" / "manifest.json").write_text("{")
    (tmp_path / "checkpoint_1" / "w.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        latest = store.latest()
    assert latest is not None
    assert latest.step == 0
    assert "checkpoint_2" in caplog.text
    assert "checkpoint_1" in caplog.text
    assert [report.sound for report in store.verify(quick=True)] == [True, False, False]


# --------------------------------------------------------------------------- an explicit directory


def test_save_directory_and_open(tmp_path: Path) -> None:
    checkpoint = save_directory(tmp_path / "a" / "b", STATE, step=3, tags=("x",))
    assert checkpoint.path == tmp_path / "a" / "b"
    assert_same(Checkpoint.open(tmp_path / "a" / "b").load(), STATE)
    save_directory(tmp_path / "a" / "b", {"w": torch.zeros(2)}, step=4)
    assert Checkpoint.open(tmp_path / "a" / "b").step == 4
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    (tmp_path / "empty").mkdir()
    save_directory(tmp_path / "empty", STATE)
    shutil.copytree(tmp_path / "empty", tmp_path / "moved")
    assert_same(Checkpoint.open(tmp_path / "moved").load(), STATE)


@pytest.mark.parametrize(
    "content", ["file", "directory of files", "damaged manifest", "a manifest of something else"]
)
def test_a_directory_that_is_not_ours_is_never_touched(tmp_path: Path, content: str) -> None:
    target = tmp_path / "d"
    if content == "file":
        target.write_text("mine")
    else:
        (target / "sub").mkdir(parents=True)
        (target / "sub" / "x").write_text("mine")
        if "manifest" in content:
            (target / "manifest.json").write_text(
                '{"name": "a web app"}' if "else" in content else '{"format": "keepstep"}'
            )
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(DirectoryNotOursError, match=r"choose another|Choose an empty or new") as caught:
        save_directory(target, STATE)
    assert isinstance(caught.value, FileExistsError)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_foreign_file_of_the_same_name_is_not_overwritten(tmp_path: Path) -> None:
    save_directory(tmp_path / "d", {"model": torch.ones(3)})
    (tmp_path / "d" / "optimizer.safetensors").write_text("mine")
    with pytest.raises(DirectoryNotOursError, match=r"optimizer.safetensors was not written by keepstep"):
        save_directory(tmp_path / "d", {"model": torch.ones(3), "optimizer": torch.ones(2)})
    assert (tmp_path / "d" / "optimizer.safetensors").read_text() == "mine"
    assert_same(Checkpoint.open(tmp_path / "d").load(), {"model": torch.ones(3)})
    assert [p.name for p in (tmp_path).iterdir()] == ["d"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_link_to_a_directory_stays_a_link(tmp_path: Path, exchange: bool) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for step in range(3):
        save_directory(tmp_path / "link", STATE, step=step, files=FaultyFiles(exchange=exchange))
    assert (tmp_path / "link").is_symlink()
    assert Checkpoint.open(tmp_path / "real").step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_relative_directory(workdir: Path) -> None:
    checkpoint = save_directory("here", STATE)
    assert str(checkpoint.path) == "here"
    assert_same(checkpoint.load(), STATE)
    store = Store("store")
    store.save(STATE)
    assert_same(Store(workdir / "store").latest().load(), STATE)  # type: ignore[union-attr]


def test_what_is_in_the_way_of_two_renames_is_not_removed(tmp_path: Path) -> None:
    save_directory(tmp_path / "d", STATE)
    (tmp_path / "d.replaced").mkdir()
    (tmp_path / "d.replaced" / "x").write_text("mine")
    with pytest.raises(DirectoryNotOursError, match=r"in the way"):
        save_directory(tmp_path / "d", STATE, files=FaultyFiles(exchange=False))
    assert (tmp_path / "d.replaced" / "x").read_text() == "mine"
    assert_same(Checkpoint.open(tmp_path / "d").load(), STATE)


@pytest.mark.parametrize("given", [3, {"keep_last": 3}])
def test_rules_of_another_type_are_refused_before_anything_is_saved(tmp_path: Path, given: Any) -> None:
    with pytest.raises(UsageError, match="expected a Retention"):
        Store(tmp_path, retention=given)


def test_a_mistyped_address_is_no_directory() -> None:
    with pytest.raises(UsageError, match="did you mean s3://bucket/run"):
        Store("s3:/bucket/run")


def test_a_checkpoint_that_goes_as_soon_as_it_is_loaded_is_loaded_all_the_same(tmp_path: Path) -> None:
    """The process that trains has pruned it; whoever evaluates has its values."""
    Store(tmp_path).save({"w": torch.ones(3)}, step=1)
    store, w = Store(tmp_path), torch.zeros(3)

    def load(checkpoint: Checkpoint, agree: Any) -> None:
        checkpoint.load_into({"w": w}, agree=agree)
        shutil.rmtree(checkpoint.path)

    found = store.load_latest_with(load)
    assert found is not None
    assert found.step == 1
    assert w.tolist() == [1, 1, 1]
    assert store.save({"w": w}, step=2).load()["w"].tolist() == [1, 1, 1]
