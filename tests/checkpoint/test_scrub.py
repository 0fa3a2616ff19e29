"""The scrub reads older checkpoints again, a little at a time, and finds what a disk has lost."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from keepstep import Store
from keepstep.checkpoint.keeping.catalog import scan
from keepstep.checkpoint.keeping.scrub import Scrubber, next_to_scrub
from keepstep.checkpoint.keeping.verify import FileState, Report, verify_checkpoint


def filled(root: Path, count: int = 4, size: int = 256) -> Store:
    store = Store(root)
    for step in range(count):
        store.save({"model": torch.full((size,), float(step))}, step=step)
    return store


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


class Notes:
    """What a scrubber found, and a clock."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.now_s = 0.0
        self.found: list[tuple[str, tuple[str, ...]]] = []
        given: dict[str, Any] = {"interval_s": 100.0, "bytes_per_s": 1e12, **options}
        self.scrubber = Scrubber(root, found=self.note, clock=lambda: self.now_s, **given)

    def note(self, path: Path, report: Report) -> None:
        self.found.append((path.name, report.problems))


def test_the_one_verified_longest_ago_comes_next_and_the_newest_never(tmp_path: Path) -> None:
    filled(tmp_path)
    entries = scan(tmp_path)
    ids = [entry.manifest.id for entry in entries if entry.manifest is not None]

    def turn(verified: dict[str, float], now_s: float = 1000.0) -> int | None:
        entry = next_to_scrub(entries, verified, now_s=now_s, interval_s=100.0)
        return None if entry is None else entry.number

    assert turn({}) == 2
    assert turn({ids[2]: 0.0}) == 1
    assert turn({ids[0]: 5.0, ids[1]: 3.0, ids[2]: 4.0}) == 1
    assert turn({ids[0]: 5.0, ids[1]: 3.0, ids[2]: 4.0}, now_s=102.0) is None
    assert next_to_scrub([], {}, now_s=0.0, interval_s=1.0) is None


def test_a_lost_bit_is_found_within_an_interval(tmp_path: Path) -> None:
    filled(tmp_path)
    notes = Notes(tmp_path)
    while notes.scrubber.turn():
        pass
    assert notes.found == []
    flip_a_bit(tmp_path / "checkpoint_1" / "model.safetensors")
    assert not notes.scrubber.turn()
    notes.now_s = 101.0
    while notes.scrubber.turn():
        pass
    assert [name for name, _ in notes.found] == ["checkpoint_1"]
    assert "its digest differs" in notes.found[0][1][0]


def test_a_shared_file_is_read_once(tmp_path: Path) -> None:
    filled(tmp_path)
    for number in (1, 2):
        path = tmp_path / f"checkpoint_{number}"
        for name in ("model.safetensors", "state.json", "manifest.json"):
            (path / name).unlink()
            os.link(tmp_path / "checkpoint_0" / name, path / name)
    known: set[FileState] = set()
    first, second = (verify_checkpoint(tmp_path / f"checkpoint_{n}", known=known) for n in (0, 1))
    assert first.sound
    assert first.bytes > 0
    assert second.sound
    assert second.bytes == 0
    flip_a_bit(tmp_path / "checkpoint_0" / "model.safetensors")
    assert verify_checkpoint(tmp_path / "checkpoint_1", known=known).sound, "its turn comes again later"
    known.clear()
    assert not verify_checkpoint(tmp_path / "checkpoint_1", known=known).sound


def test_damage_in_a_shared_file_is_damage_of_each(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "checkpoint_1" / "model.safetensors").unlink()
    os.link(tmp_path / "checkpoint_0" / "model.safetensors", tmp_path / "checkpoint_1" / "model.safetensors")
    flip_a_bit(tmp_path / "checkpoint_0" / "model.safetensors")
    known: set[FileState] = set()
    reports = [verify_checkpoint(tmp_path / f"checkpoint_{n}", known=known) for n in (0, 1)]
    assert [report.sound for report in reports] == [False, False]


def test_it_reads_no_faster_than_told(tmp_path: Path) -> None:
    store = filled(tmp_path, count=2, size=1 << 16)
    notes = Notes(tmp_path, bytes_per_s=1e6)
    began = time.monotonic()
    notes.scrubber.turn()
    assert time.monotonic() - began >= store.list()[0].bytes / 1e6


def test_it_stops_in_the_middle_of_a_checkpoint(tmp_path: Path) -> None:
    filled(tmp_path, count=2, size=1 << 16)
    notes = Notes(tmp_path, bytes_per_s=1.0)
    notes.scrubber.start()
    time.sleep(0.05)
    began = time.monotonic()
    notes.scrubber.stop()
    assert time.monotonic() - began < 1.0
    assert "keepstep-scrub" not in [thread.name for thread in threading.enumerate()]
    assert notes.found == []


def test_what_is_deleted_meanwhile_is_no_damage(tmp_path: Path) -> None:
    store = filled(tmp_path)
    notes = Notes(tmp_path)
    slowly = notes.scrubber._slowly

    def delete_first(count: int) -> None:
        if len(store.list()) == 4:
            store.delete("checkpoint_2")
        slowly(count)

    notes.scrubber._slowly = delete_first  # type: ignore[method-assign]
    assert notes.scrubber.turn()
    assert notes.found == []
