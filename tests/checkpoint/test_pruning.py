"""Retention at work: what is deleted, what is put off, and what must be there first."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from keepstep import Retention, Store
from keepstep.checkpoint.format.known import KnownManifests
from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.source import LocalSource
from keepstep.checkpoint.keeping import pruning
from keepstep.checkpoint.keeping.pruning import check_committed, survey
from keepstep.checkpoint.place.deletion import reading
from keepstep.errors import CheckpointBusyError, CheckpointNotFoundError, DamagedCheckpointError


def state(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"model": torch.full((4,), float(value))}


def names(store: Store) -> list[str]:
    return [checkpoint.name for checkpoint in store.list()]


def filled(root: Path, count: int, **metrics: list[float]) -> Store:
    store = Store(root)
    for step in range(count):
        store.save(state(step), step=step, metrics={name: values[step] for name, values in metrics.items()})
    return store


def share(store: Store, first: str, second: str, name: str = "model.safetensors") -> None:
    """Make a file of two checkpoints one."""
    (store.path / second / name).unlink()
    os.link(store.path / first / name, store.path / second / name)


READER = """
import sys
from pathlib import Path
from keepstep.checkpoint.place.deletion import reading
with reading(Path(sys.argv[1])):
    print("reading", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_reads(directory: Path) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", READER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    yield
    process.communicate()


def test_what_another_process_reads_goes_when_it_is_done(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    store = Store(store.path, retention=Retention(keep_last=1))
    with another_process_reads(tmp_path / "checkpoint_0"):
        assert store.prune() == ["checkpoint_1"]
        with pytest.raises(CheckpointBusyError, match="checkpoint_0 is being read"):
            store.delete("checkpoint_0")
        assert Store(tmp_path).get("checkpoint_0").verify().sound
    assert store.prune() == ["checkpoint_0"]
    assert names(store) == ["checkpoint_2"]


def test_what_this_process_reads_stays_through_a_save(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    store = Store(store.path, retention=Retention(keep_last=1))
    with reading(tmp_path / "checkpoint_0"), reading(tmp_path / "checkpoint_0"):
        store.save(state())
    assert names(store) == ["checkpoint_0", "checkpoint_2"]
    store.save(state())
    assert names(store) == ["checkpoint_3"]


def test_a_load_marks_what_it_reads(tmp_path: Path) -> None:
    class Deletes:
        """Tries to delete the checkpoint that it is restored from."""

        def __init__(self, store: Store) -> None:
            self.store = store

        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.store.delete("checkpoint_0")

    store = Store(tmp_path)
    store.save({"object": Deletes(store)})
    with pytest.raises(Exception, match="is being read"):
        store.load_latest_into({"object": Deletes(store)})
    store.delete("checkpoint_0")


def test_a_read_that_comes_too_late_says_that_it_is_gone(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    checkpoint = store.list()[0]
    store.delete(checkpoint)
    with pytest.raises(CheckpointNotFoundError):
        checkpoint.load()
    with reading(checkpoint.path):
        pass


def test_a_directory_without_write_permission_is_read(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    (tmp_path / "checkpoint_0").chmod(0o555)
    try:
        assert store.list()[0].load()["model"].tolist() == [0.0] * 4
    finally:
        (tmp_path / "checkpoint_0").chmod(0o755)


def test_a_damaged_newest_one_stands_in_for_nobody(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    (tmp_path / "checkpoint_2" / "model.safetensors").unlink()
    store = Store(store.path, retention=Retention(keep_last=1))
    assert store.prune() == ["checkpoint_0"]
    assert names(store) == ["checkpoint_1", "checkpoint_2"]
    latest = store.latest()
    assert latest is not None
    assert latest.name == "checkpoint_1"


def test_nothing_is_deleted_for_a_commit_that_does_not_read_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(directory: Path, manifest: Manifest, known: KnownManifests) -> None:
        os.truncate(directory / "model.safetensors", 5)  # the disk lost it, against its word
        check_committed(directory, manifest, known)

    store = filled(tmp_path, 2)
    store = Store(store.path, retention=Retention(keep_last=1))
    monkeypatch.setattr("keepstep.checkpoint.upkeep.check_committed", cut)
    store.save(state())
    assert names(store) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    assert "checkpoint_2" in caplog.text
    assert "nothing older was deleted" in caplog.text


def test_another_manifest_than_was_committed_is_noticed(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    first, second = store.list()
    check_committed(first.path, first.manifest, KnownManifests())
    with pytest.raises(DamagedCheckpointError, match="not the one that was committed"):
        check_committed(first.path, second.manifest, KnownManifests())


def test_a_manifest_that_was_replaced_or_edited_is_read_again(tmp_path: Path) -> None:
    store, known = filled(tmp_path, 1), KnownManifests()
    path = tmp_path / "checkpoint_0"
    first = known.read(path)
    assert first.step == 0
    assert known.read(path) is first
    shutil.copytree(filled(tmp_path / "other", 2).path / "checkpoint_1", tmp_path / "new")
    (tmp_path / "new" / "manifest.json").rename(path / "manifest.json")
    assert known.read(path).step == 1
    time.sleep(0.05)  # the clock of file systems ticks a hundred times a second
    with (path / "manifest.json").open("r+b") as file:
        file.write(b"[")  # in place, and of the same size
    with pytest.raises(DamagedCheckpointError):
        known.read(path)
    (path / "manifest.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="missing"):
        known.read(path)
    assert store.list() == []


def test_what_others_do_to_a_checkpoint_between_two_saves_counts_for_retention(tmp_path: Path) -> None:
    store = Store(tmp_path, retention=Retention(keep_last=2))
    for step in range(2):
        store.save(state(step), step=step)
    pinned = Store(tmp_path / "other").save(state(), step=5, pinned=True)
    for name in ("state.json", "model.safetensors", "manifest.json"):
        (pinned.path / name).rename(tmp_path / "checkpoint_0" / name)
    for step in range(2, 5):
        store.save(state(step), step=step)
    assert names(store) == ["checkpoint_0", "checkpoint_3", "checkpoint_4"]
    (tmp_path / "checkpoint_3" / "manifest.json").write_bytes(b"{}")
    store.save(state(5), step=5)
    assert not (tmp_path / "checkpoint_2").exists()
    assert (tmp_path / "checkpoint_3").exists(), "damage is for a person to look at"


def test_a_save_reads_no_manifest_but_its_own_and_that_of_what_it_deletes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, retention=Retention(keep_last=3))
    for step in range(4):
        store.save(state(step), step=step)
    read: list[str] = []
    before = LocalSource.read_small

    def note(source: LocalSource, name: str, limit_bytes: int) -> bytes:
        read.append(source.name)
        return before(source, name, limit_bytes)

    monkeypatch.setattr(LocalSource, "read_small", note)
    store.save(state(4), step=4)
    assert read == ["checkpoint_4", "checkpoint_1"]


def test_linked_files_count_once_on_disk(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    share(store, "checkpoint_0", "checkpoint_1")
    share(store, "checkpoint_0", "checkpoint_2")
    one, segment = store.list()[0].bytes, (tmp_path / "checkpoint_0" / "model.safetensors").stat().st_size
    store = Store(store.path, retention=Retention(byte_budget=3 * one - 2 * segment))
    assert store.prune() == []
    store = Store(store.path, retention=Retention(byte_budget=3 * one - 2 * segment - 1))
    assert store.prune() == ["checkpoint_0"]


def test_what_each_takes_on_disk(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    entries, held = survey(tmp_path)
    assert [sum(held[entry.number].values()) for entry in entries] == [c.bytes for c in store.list()]
    assert not held[0].keys() & held[1].keys()
    share(store, "checkpoint_0", "checkpoint_1")
    _, held = survey(tmp_path)
    assert len(held[0].keys() & held[1].keys()) == 1


def test_the_best_is_known_after_a_resume_and_a_move(tmp_path: Path) -> None:
    rules = Retention(keep_last=1, keep_best=("loss", "min", 2))
    store = Store(tmp_path / "here", retention=rules)
    for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, 5.0]):
        store.save(state(step), step=step, metrics={"loss": loss})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = Store(tmp_path / "there", retention=rules)
    assert moved.load_latest_into(state()) is not None
    moved.save(state(), step=5, metrics={"loss": 1.5})
    assert [checkpoint.step for checkpoint in moved.list()] == [1, 5]
    best = moved.best("loss")
    assert best is not None
    assert (best.step, best.metrics["loss"]) == (1, 1.0)
    moved.save(state(), step=6)
    assert [checkpoint.step for checkpoint in moved.list()] == [1, 5, 6]


def test_a_disk_that_refuses_is_told_and_what_is_gone_already_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path, 3)
    store = Store(store.path, retention=Retention(keep_last=1))
    entries, _ = survey(tmp_path)
    store.delete("checkpoint_0")
    assert not pruning.drop(tmp_path, entries[0])
    with caplog.at_level(logging.DEBUG):
        assert store.prune() == ["checkpoint_1"]
    assert "no rule keeps it" in caplog.text
