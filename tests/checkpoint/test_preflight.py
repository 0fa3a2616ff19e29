"""Room on the disk is looked at before a save; `free` is the only thing played, deletions are real."""

from __future__ import annotations

import datetime as dt
import logging
import os
from pathlib import Path

import pytest
import torch

from keepstep import Retention, Store
from keepstep.checkpoint.keeping.preflight import Preflight, to_make_room
from keepstep.checkpoint.keeping.pruning import survey
from keepstep.errors import StoreError
from keepstep.files import free_bytes

NOW = dt.datetime(2030, 1, 1, tzinfo=dt.UTC)


def filled(root: Path, count: int = 4) -> Store:
    store = Store(root)
    for step in range(count):
        store.save({"model": torch.full((256,), float(step))}, step=step, metrics={"loss": float(step)})
    return store


def names(store: Store) -> list[int]:
    return [int(checkpoint.name.removeprefix("checkpoint_")) for checkpoint in store.list()]


def allowed(store: Store, rules: Retention, needed_bytes: int = 1000) -> list[int]:
    entries, held = survey(store.path)
    decisions = to_make_room(entries, rules, held, needed_bytes=needed_bytes, now=NOW)
    return [decision.entry.number for decision in decisions]


class Disk:
    """So many bytes in all; what lies in the store takes its size, a file with two names once."""

    def __init__(self, root: Path, capacity: int) -> None:
        self.root, self.capacity = root, capacity

    def __call__(self, path: Path) -> int:
        files = {p.stat().st_ino: p.stat().st_size for p in self.root.rglob("*.safetensors")}
        return self.capacity - sum(files.values())


def test_what_the_rules_would_drop_after_the_next_save_may_go_before_it(tmp_path: Path) -> None:
    store = filled(tmp_path)
    assert allowed(store, Retention()) == []
    assert allowed(store, Retention(keep_last=4)) == [0]
    assert allowed(store, Retention(keep_last=2)) == [0, 1, 2]
    assert allowed(store, Retention(keep_last=1)) == [0, 1, 2], "the newest stays: the next may fail"
    assert allowed(store, Retention(keep_last=1, keep_best=("loss", "min", 2))) == [2]
    assert allowed(store, Retention(keep_within_s=60)) == [0, 1, 2]
    assert allowed(store, Retention(byte_budget=1 << 20), 1 << 30) == [0, 1, 2]
    (tmp_path / "checkpoint_3" / "model.safetensors").unlink()
    assert allowed(store, Retention(keep_last=1)) == [0, 1], "the newest that is sound"
    assert allowed(Store(tmp_path / "empty"), Retention(keep_last=1)) == []


def test_room_is_made_oldest_first_and_no_more_than_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    one = (tmp_path / "checkpoint_0" / "model.safetensors").stat().st_size
    preflight, rules = Preflight(Disk(tmp_path, 5 * one)), Retention(keep_last=2)
    preflight.check(tmp_path, one, rules, store._delete)
    assert names(store) == [0, 1, 2, 3]
    preflight.check(tmp_path, 2 * one, rules, store._delete)
    assert names(store) == [1, 2, 3]
    preflight.check(tmp_path, 9 * one, rules, store._delete)
    assert names(store) == [3]
    assert f"needs about {9 * one} bytes, and {4 * one} are free" in caplog.text


def test_a_warning_comes_once_until_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, free = filled(tmp_path), [10]
    preflight = Preflight(lambda _: free[-1])
    for amount in (10, 9, 8):
        free.append(amount)
        preflight.check(tmp_path, 1000, Retention(), store._delete)
    assert len(caplog.records) == 1
    for amount in (2000, 10):
        free.append(amount)
        preflight.check(tmp_path, 1000, Retention(), store._delete)
    assert len(caplog.records) == 2
    assert names(store) == [0, 1, 2, 3]


def test_what_will_be_linked_needs_no_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = filled(tmp_path)
    segment = tmp_path / "checkpoint_3" / "model.safetensors"
    size = segment.stat().st_size
    segment.unlink()
    os.link(tmp_path / "checkpoint_2" / "model.safetensors", segment)
    Preflight(lambda _: 100).check(tmp_path, size + 100, Retention(), store._delete)
    assert not caplog.records
    Preflight(lambda _: 100).check(tmp_path, size + 101, Retention(), store._delete)
    assert "needs about 101 bytes" in caplog.text


def test_a_disk_that_refuses_to_delete_does_not_stop_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(entry: object) -> None:
        raise StoreError("deleting failed: the disk is tired")

    filled(tmp_path)
    with caplog.at_level(logging.WARNING):
        Preflight(lambda _: 0).check(tmp_path, 10, Retention(keep_last=1), refuse)
    assert "the disk is tired" in caplog.text


def test_a_system_that_does_not_say_is_believed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    Preflight(lambda _: None).check(tmp_path, 1 << 60, Retention(keep_last=1), store._delete)
    assert names(store) == [0, 1, 2, 3]


def test_free_bytes_of_a_place_that_is_not_made_yet(tmp_path: Path) -> None:
    here, there = free_bytes(tmp_path), free_bytes(tmp_path / "not" / "yet")
    assert here is not None
    assert there is not None
    assert abs(here - there) < 1 << 30
