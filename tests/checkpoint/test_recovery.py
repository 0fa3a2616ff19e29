"""Falling back over damaged checkpoints, however many and of whatever kind; and finding them before."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.test_parse import write_manifest

from keepstep import Checkpoint, Retention, Store
from keepstep.errors import NoValidCheckpointError, StoreError, UsageError


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model": torch.full((64,), float(value)), "other": torch.full((8,), float(value))}


def filled(root: Path, count: int) -> Store:
    store = Store(root)
    for step in range(count):
        store.save(state(step), step=step)
    return store


def flip(name: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[random.Random(path.name).randrange(len(data))] ^= 1 << 3
        (path / name).write_bytes(data)

    return spoil


def cut(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, (path / name).stat().st_size // 2)


def lose(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def swap(path: Path) -> None:
    model, other = path / "model.safetensors", path / "other.safetensors"
    model.rename(path / "between")
    other.rename(model)
    (path / "between").rename(other)


def become_a_directory(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").mkdir()


def name_a_stranger(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../model.safetensors"] = manifest["files"].pop("model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))


SPOILS: list[Callable[[Path], None]] = [
    *(kind(name) for kind in (flip, cut) for name in ("manifest.json", "state.json", "model.safetensors")),
    flip("other.safetensors"),
    lose("state.json"),
    lose("model.safetensors"),
    swap,
    become_a_directory,
    name_a_stranger,
]


def test_a_resume_falls_back_over_twenty_damaged_in_a_row_and_names_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled(tmp_path, 24)
    for number in range(4, 24):
        SPOILS[number % len(SPOILS)](tmp_path / f"checkpoint_{number}")
    live = state(-1)
    with caplog.at_level(logging.ERROR):
        restored = store.load_latest_into(live)
    assert restored is not None
    assert restored.name == "checkpoint_3"
    assert torch.equal(live["model"], state(3)["model"])
    assert torch.equal(live["other"], state(3)["other"])
    for number in range(4, 24):
        assert f"checkpoint_{number} is damaged and is set aside" in caplog.text
    aside = tmp_path / ".keepstep" / "damaged"
    assert len(list(aside.iterdir())) == 20
    assert store.save(state(0)).name == "checkpoint_24", "a number is used once"


def test_only_damaged_ones_are_no_first_start(tmp_path: Path) -> None:
    filled(tmp_path, len(SPOILS))
    for number, spoil in enumerate(SPOILS):
        spoil(tmp_path / f"checkpoint_{number}")
    for _ in range(2):
        with pytest.raises(NoValidCheckpointError, match="checkpoint_0"):
            Store(tmp_path).load_latest_into(state(0))


def wait_until_aside(store: Store, name: str) -> None:
    until_s = time.monotonic() + 30
    while not (store.path / ".keepstep" / "damaged" / name).exists():
        assert time.monotonic() < until_s, f"{name} is not set aside"
        time.sleep(0.01)


def test_the_scrub_of_a_store_sets_damaged_ones_aside_and_keeps_going(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 4)
    flip("model.safetensors")(tmp_path / "checkpoint_1")
    store = Store(tmp_path, scrub_interval_s=0.2, scrub_bytes_per_s=1e9)
    store.claim()
    wait_until_aside(store, "checkpoint_1")
    assert [checkpoint.name for checkpoint in store.list()] == [
        "checkpoint_0",
        "checkpoint_2",
        "checkpoint_3",
    ]
    assert "checkpoint_1 is damaged" in caplog.text
    flip("model.safetensors")(tmp_path / "checkpoint_2")
    wait_until_aside(store, "checkpoint_2")
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_0", "checkpoint_3"]
    store.close()


def test_what_was_found_damaged_is_not_linked_to(tmp_path: Path) -> None:
    frozen = torch.arange(1 << 18)
    store = Store(tmp_path, scrub_interval_s=0.05)
    for step in range(3):
        store.save({"base": frozen, "step": torch.tensor(step)}, step=step)
    first, second = (tmp_path / f"checkpoint_{number}" / "base.safetensors" for number in (1, 2))
    assert first.samefile(second), "unchanged data is linked"
    flip("base.safetensors")(tmp_path / "checkpoint_1")
    wait_until_aside(store, "checkpoint_1")
    saved = store.save({"base": frozen, "step": torch.tensor(9)})
    assert saved.verify().sound
    assert not (saved.path / "base.safetensors").samefile(second)
    store.close()


def test_a_store_that_is_dropped_stops_its_scrub(tmp_path: Path) -> None:
    store = Store(tmp_path, scrub_interval_s=0.01)
    store.claim()
    scrubber = store._upkeep._scrubber
    assert scrubber is not None
    assert scrubber._thread.is_alive()
    del store
    deadline = time.monotonic() + 10
    while scrubber._thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not scrubber._thread.is_alive()


def test_no_scrub_unless_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.claim()
    assert store._upkeep._scrubber is None
    with pytest.raises(UsageError, match="scrub_interval_s is 0"):
        Store(tmp_path, scrub_interval_s=0)
    with pytest.raises(UsageError, match="scrub_bytes_per_s is -1"):
        Store(tmp_path, scrub_bytes_per_s=-1, retention=Retention())


def test_who_has_nothing_left_is_told_where_it_lies_and_how_parts_are_rescued(tmp_path: Path) -> None:
    filled(tmp_path, 7)
    for number in range(7):
        flip("other.safetensors")(tmp_path / f"checkpoint_{number}")
    for _ in range(2):  # as they are found, and as they were found before
        with pytest.raises(NoValidCheckpointError) as caught:
            Store(tmp_path).load_latest_into(state(9))
        told = str(caught.value)
        hint = re.search(r'Checkpoint\.open\("([^"]+)"\)\.load\(only="model"\)', told)
        assert hint is not None
        assert hint[1] == str(tmp_path / ".keepstep" / "damaged" / "checkpoint_6")
        assert torch.equal(Checkpoint.open(hint[1]).load(only="model")["model"], state(6)["model"])
    assert "\n  checkpoint_0, ..., checkpoint_6 (7 checkpoints): set aside earlier\n" in told


def test_a_damaged_checkpoint_that_could_not_be_moved_is_named_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, 1)
    flip("other.safetensors")(tmp_path / "checkpoint_0")

    def refuse(place: object) -> Path:
        raise StoreError("read-only")

    monkeypatch.setattr(store._backend, "set_aside", refuse)
    with pytest.raises(NoValidCheckpointError) as caught:
        store.load_latest_into(state(9))
    assert f'Checkpoint.open("{tmp_path / "checkpoint_0"}")' in str(caught.value)


def newer_format(path: Path) -> None:
    """As a later version of keepstep would write it."""
    manifest = json.loads((path / "manifest.json").read_text())
    write_manifest(path, {**manifest, "schema": 2})


def test_what_a_newer_keepstep_wrote_is_not_damaged(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    newer_format(tmp_path / "checkpoint_2")
    store = Store(tmp_path)
    with pytest.raises(StoreError, match=r"upgrade keepstep. It may well be whole, so it was not set aside"):
        store.load_latest_into(state(0))
    assert (tmp_path / "checkpoint_2").is_dir()
    assert [report.refused for report in store.verify()] == [False, False, True]


def test_the_scrub_passes_over_what_a_newer_keepstep_wrote(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 4)
    flip("model.safetensors")(tmp_path / "checkpoint_0")  # whose turn is the last
    newer_format(tmp_path / "checkpoint_1")
    store = Store(tmp_path, scrub_interval_s=0.01)
    store.claim()
    wait_until_aside(store, "checkpoint_0")
    store.close()
    assert [report.refused for report in store.verify()] == [True, False, False]
    assert "checkpoint_1" not in caplog.text


@pytest.mark.parametrize("lost", [1, 3])
def test_a_directory_that_lost_its_manifest_is_not_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: int
) -> None:
    filled(tmp_path, 3)
    (tmp_path / "checkpoint_9").mkdir()  # somebody's own
    for number in range(3 - lost, 3):
        (tmp_path / f"checkpoint_{number}" / "manifest.json").unlink()
    for ask in (Store(tmp_path).latest, lambda: Store(tmp_path).load_latest_into(state(0))):
        caplog.clear()
        found = ask()
        assert (found.step if found else -1) == 2 - lost
        told = [r.getMessage() for r in caplog.records if "it was copied in part" in r.getMessage()]
        assert len(told) == lost
        assert str(tmp_path / "checkpoint_2") in told[-1]


def test_a_checkpoint_loads_after_the_program_changed_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    filled(tmp_path, 1)
    checkpoint = Checkpoint.open("checkpoint_0")
    monkeypatch.chdir("/")
    assert checkpoint.load()["model"].shape == (64,)


@pytest.mark.parametrize(
    ("shut", "told"),
    [
        ("checkpoint_2", r"checkpoint_2.*Permission denied\).*not set aside"),
        (".", "can't be listed: Permission denied"),
    ],
)
def test_what_may_not_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shut: str, told: str
) -> None:
    filled(tmp_path, 3)
    real = {name: getattr(os, name) for name in ("open", "stat", "lstat", "scandir")}

    def guarded(name: str) -> Callable[..., Any]:
        def ask(path: Any, *args: Any, **options: Any) -> Any:
            inside = name == "scandir" or str(path) != str(tmp_path / shut)
            if str(path).startswith(str(tmp_path / shut)) and inside:
                raise PermissionError(13, "Permission denied", str(path))
            return real[name](path, *args, **options)

        return ask

    for name in real:
        monkeypatch.setattr(os, name, guarded(name))
    with pytest.raises(StoreError, match=told):
        Store(tmp_path).load_latest_into(state(0))
    monkeypatch.undo()
    assert [checkpoint.step for checkpoint in Store(tmp_path).list()] == [0, 1, 2]
