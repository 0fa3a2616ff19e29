"""Whatever operation a save dies at, the checkpoint before or the new one is there, and saving goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same, difference
from tests.checkpoint.faults import IO_ERROR, NO_SPACE, FaultyFiles
from tests.crash.harness import (
    Scenario,
    fail_at_each_operation,
    kill_at_each_operation,
    leftovers,
    operations_of,
)
from tests.crash.tally import Tally

from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import BackgroundSaveError, NoSpaceError, StoreError
from keepstep.files import LocalFiles


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def state(number: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((3000,), float(number)), "b": torch.arange(5) + number},
        "train": {"step": number, "rng": torch.full((16,), number, dtype=torch.uint8)},
    }


def whole(checkpoint: Checkpoint) -> int:
    """The number of the state that a checkpoint holds, which must be sound to the last byte."""
    report = checkpoint.verify()
    assert report.sound, report.problems
    loaded = checkpoint.load()
    number = loaded["train"]["step"]
    assert_same(loaded, state(number))
    live = state(0)
    checkpoint.load_into(live)
    assert_same(live, state(number))
    return number


# -------------------------------------------------------------------------------------- in a store


def _store_holds(root: Path, allowed: tuple[int | None, ...], *, kept: tuple[int, ...] = ()) -> None:
    store = Store(root)
    newest = store.latest()
    assert (None if newest is None else whole(newest)) in allowed
    held = [whole(checkpoint) for checkpoint in store.list()]
    assert set(kept) <= set(held)
    assert whole(store.save(state(9))) == 9
    assert whole(Store(root).latest()) == 9  # type: ignore[arg-type]
    assert leftovers(root) == []
    live = state(0)
    assert Store(root).load_latest_into(live) is not None
    assert_same(live, state(9))


def _with_saves(*numbers: int) -> Callable[[Path], None]:
    def before(root: Path) -> None:
        store = Store(root)
        for number in numbers:
            store.save(state(number), step=number)

    return before


def _prune(root: Path, files: Any) -> None:
    Store(root, files=files, retention=Retention(keep_last=2)).save(state(4), step=4)


def _background(root: Path, files: Any) -> None:
    store = Store(root, files=files)
    store.save_in_background(state(2), step=2)
    store.wait()


def _foreign_before(root: Path) -> None:
    _with_saves(1, 2)(root)
    (root / "checkpoint_0" / "notes.txt").write_text("mine")


def _foreign_check(root: Path) -> None:
    notes = list(root.rglob("notes.txt"))
    assert [p.read_text() for p in notes] == ["mine"]
    _store_holds(root, (2,)) if not _in_trash(notes[0]) else None


def _in_trash(path: Path) -> bool:
    return "trash" in path.parts


# --------------------------------------------------------------------------- an explicit directory


def _directory_check(root: Path) -> None:
    target = root / "mine"
    if target.exists() or (root / "mine.replaced").exists():
        assert whole(Checkpoint.open(target)) in (1, 2)
    assert whole(save_directory(target, state(9))) == 9
    assert whole(Checkpoint.open(target)) == 9
    assert leftovers(root) == []


def _replace_before(root: Path) -> None:
    save_directory(root / "mine", state(1))
    (root / "mine" / "notes.txt").write_text("keep me")
    (root / "mine" / "logs" / "deep").mkdir(parents=True)
    (root / "mine" / "logs" / "deep" / "run.log").write_text("line")
    (root / "mine" / "link").symlink_to("notes.txt")
    (root / "mine.tmp-not-ours").mkdir()


def _replace_check(root: Path) -> None:
    assert whole(Checkpoint.open(root / "mine")) in (1, 2)
    assert whole(save_directory(root / "mine", state(9))) == 9
    for path, text in (("notes.txt", "keep me"), ("logs/deep/run.log", "line"), ("link", "keep me")):
        assert (root / "mine" / path).read_text() == text
    assert (root / "mine" / "link").is_symlink()
    (root / "mine.tmp-not-ours").rmdir()
    assert leftovers(root) == []


SCENARIOS = {
    "first save": Scenario(
        lambda root: None,
        lambda root, files: Store(root, files=files).save(state(1)) and None,
        lambda root: _store_holds(root, (None, 1)),
    ),
    "later save": Scenario(
        _with_saves(1),
        lambda root, files: Store(root, files=files).save(state(2)) and None,
        lambda root: _store_holds(root, (1, 2), kept=(1,)),
    ),
    "save with pruning": Scenario(
        _with_saves(1, 2, 3), _prune, lambda root: _store_holds(root, (3, 4), kept=(3,))
    ),
    "background save": Scenario(
        _with_saves(1), _background, lambda root: _store_holds(root, (1, 2), kept=(1,))
    ),
    "delete": Scenario(
        _with_saves(1, 2),
        lambda root, files: Store(root, files=files).delete("checkpoint_0"),
        lambda root: _store_holds(root, (2,), kept=(2,)),
    ),
    "delete with foreign files": Scenario(
        _foreign_before,
        lambda root, files: Store(root, files=files).delete("checkpoint_0"),
        _foreign_check,
    ),
    "new directory": Scenario(
        lambda root: None,
        lambda root, files: save_directory(root / "mine", state(1), files=files) and None,
        _directory_check,
    ),
    "replaced directory": Scenario(
        _replace_before,
        lambda root, files: save_directory(root / "mine", state(2), files=files) and None,
        _replace_check,
    ),
}

CASES = [(name, True) for name in SCENARIOS] + [("replaced directory", False)]
"""The second value is whether the system can swap two names; where it can't, two renames do."""


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize(("name", "exchange"), CASES)
def test_killed_at_every_operation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tally: Tally,
    name: str,
    exchange: bool,
    power_cut: bool,
) -> None:
    done = kill_at_each_operation(
        tmp_path, monkeypatch, SCENARIOS[name], power_cut=power_cut, exchange=exchange
    )
    tally("operations at which the power was cut" if power_cut else "operations killed at", done)


@pytest.mark.parametrize("error", [NO_SPACE, IO_ERROR], ids=["no space", "i/o error"])
@pytest.mark.parametrize(("name", "exchange"), CASES)
def test_an_error_at_every_operation(
    tmp_path: Path, tally: Tally, name: str, exchange: bool, error: OSError
) -> None:
    done = fail_at_each_operation(tmp_path, SCENARIOS[name], error, exchange=exchange)
    tally("operations that failed", done)


@pytest.mark.parametrize("background", [False, True])
def test_a_store_that_met_an_error_saves_again(tmp_path: Path, background: bool) -> None:
    """The same store object, after a full disk at each operation of a save."""
    whole_run = FaultyFiles()
    store = Store(tmp_path / "whole", files=whole_run)
    store.save(state(1))
    first = len(whole_run.log)
    store.save(state(2))
    for at in range(first, len(whole_run.log)):
        root = tmp_path / f"at{at}"
        files = FaultyFiles(at=at, error=NO_SPACE)
        store = Store(root, files=files)
        store.save(state(1))
        if background:
            with pytest.raises((BackgroundSaveError, NoSpaceError)):
                store.save_in_background(state(2)).wait()
            store.wait()  # it was told once
        else:
            with pytest.raises(NoSpaceError, match=r"saving .*checkpoint_1.*Other checkpoints are whole"):
                store.save(state(2))
        newest = store.latest()
        assert newest is not None
        assert whole(newest) in (1, 2)
        assert leftovers(root) == []
        assert whole(store.save(state(3))) == 3


def test_every_kind_of_operation_is_met(tmp_path: Path) -> None:
    kinds = {
        line.split()[0]
        for name, scenario in SCENARIOS.items()
        for exchange in (True, False)
        for line in operations_of(tmp_path / f"{name}{exchange}", scenario, exchange=exchange)
    }
    expected = {name for name in vars(LocalFiles) if not name.startswith("_")}
    of_exports = {"make_file"}  # met in tests/models
    assert kinds == expected - of_exports | {"write_at", "finish"}


def test_nothing_is_held_open_after_a_failed_save(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(state(1))
    open_before = open_files()
    for at in range(len(operations_of(tmp_path, SCENARIOS["new directory"]))):
        files = FaultyFiles(at=at, error=IO_ERROR)
        with pytest.raises(StoreError):
            save_directory(tmp_path / str(at) / "mine", state(1), files=files)
    assert open_files() == open_before


def test_states_are_told_apart() -> None:
    assert difference(state(1), state(2)) is not None
