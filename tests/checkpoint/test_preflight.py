"""Room on the disk is looked at before a save; `free` is the only thing played, deletions are real."""

from __future__ import annotations

import datetime as dt
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from keepstep import Retention, Store
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.keeping.preflight import Preflight, to_make_room
from keepstep.checkpoint.keeping.pruning import survey
from keepstep.checkpoint.place.backend import Workspace
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.upkeep import Upkeep
from keepstep.errors import StoreError
from keepstep.files import LocalFiles, free_bytes

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


class Disk(LocalBackend):
    """A real store on a disk of so many bytes; what lies in it takes its size, a file with two names once."""

    def __init__(self, root: Path, capacity: int | None, *, refuses: bool = False) -> None:
        super().__init__(LocalFiles(), root)
        self.capacity, self.refuses = capacity, refuses

    def free_bytes(self) -> int | None:
        files = {p.stat().st_ino: p.stat().st_size for p in self.path.rglob("*.safetensors")}
        return None if self.capacity is None else max(0, self.capacity - sum(files.values()))

    def delete(self, place: Place) -> None:
        if self.refuses:
            raise StoreError("deleting failed: the disk is tired")
        super().delete(place)


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
    preflight, disk, rules = Preflight(), Disk(tmp_path, 5 * one), Retention(keep_last=2)
    preflight.check(disk, one, rules)
    assert names(store) == [0, 1, 2, 3]
    preflight.check(disk, 2 * one, rules)
    assert names(store) == [1, 2, 3]
    preflight.check(disk, 9 * one, rules)
    assert names(store) == [3]
    assert f"needs about {9 * one} bytes, and {4 * one} are free" in caplog.text


def test_a_warning_comes_once_until_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path)
    preflight, full, empty = Preflight(), Disk(tmp_path, 0), Disk(tmp_path, 1 << 40)
    for disk in (full, full, full):
        preflight.check(disk, 1000, Retention())
    assert len(caplog.records) == 1
    for disk in (empty, full):
        preflight.check(disk, 1000, Retention())
    assert len(caplog.records) == 2
    assert names(store) == [0, 1, 2, 3]


def test_what_will_be_linked_needs_no_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path)
    segment = tmp_path / "checkpoint_3" / "model.safetensors"
    size = segment.stat().st_size
    segment.unlink()
    os.link(tmp_path / "checkpoint_2" / "model.safetensors", segment)
    disk = Disk(tmp_path, 3 * size + 100)
    Preflight().check(disk, size + 100, Retention())
    assert not caplog.records
    Preflight().check(disk, size + 101, Retention())
    assert "needs about 101 bytes" in caplog.text


def test_what_will_be_linked_is_not_counted_twice_against_a_budget(tmp_path: Path) -> None:
    """A checkpoint that the rules would keep after the save must not go before it."""
    store = Store(tmp_path)
    base = torch.nn.Linear(512, 1024).requires_grad_(False)
    for step in range(4):
        store.save({"base": base, "adapter": torch.full((4,), float(step))}, step=step)
    size = store.list()[0].bytes
    assert allowed(store, Retention(byte_budget=size * 3 // 2), size) == []
    assert allowed(store, Retention(byte_budget=size // 2), size) == [0, 1, 2]


def test_a_disk_that_refuses_to_delete_does_not_stop_the_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path)
    with caplog.at_level(logging.WARNING):
        Preflight().check(Disk(tmp_path, 0, refuses=True), 10, Retention(keep_last=1))
    assert "the disk is tired" in caplog.text


def test_a_place_that_does_not_say_is_believed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    Preflight().check(Disk(tmp_path, None), 1 << 60, Retention(keep_last=1))
    assert names(store) == [0, 1, 2, 3]


def test_a_save_makes_room_before_it_writes(tmp_path: Path) -> None:
    filled(tmp_path)
    one = (tmp_path / "checkpoint_0" / "model.safetensors").stat().st_size
    store = Store(tmp_path, retention=Retention(keep_last=2))
    disk = Disk(tmp_path, 4 * one)
    store._saves._parts = replace(store._saves._parts, backend=disk, upkeep=Upkeep(disk))
    seen = []
    reserve = disk.reserve

    def note() -> Workspace:
        workspace = reserve()
        opening = workspace.open
        workspace.open = lambda: (seen.append(names(store)), opening())[1]  # type: ignore[method-assign,func-returns-value]
        return workspace

    disk.reserve = note  # type: ignore[method-assign]
    store.save({"model": torch.ones(256)})
    assert seen == [[1, 2, 3]]
    assert names(store) == [3, 4]


def test_free_bytes_of_a_place_that_is_not_made_yet(tmp_path: Path) -> None:
    here, there = free_bytes(tmp_path), free_bytes(tmp_path / "not" / "yet")
    assert here is not None
    assert there is not None
    assert abs(here - there) < 1 << 30
