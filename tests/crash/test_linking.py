"""Saves that link to the one before: killed, failing, and with what they link to gone or changed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.checkpoint.faults import IO_ERROR, NO_SPACE, FaultyFiles
from tests.crash.harness import (
    Scenario,
    fail_at_each_operation,
    kill_at_each_operation,
    leftovers,
    operations_of,
)
from tests.crash.tally import Tally

from keepstep.checkpoint.in_flight import Staging
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import BackgroundSaveError, StoreError


@pytest.fixture(autouse=True)
def even_small_segments_are_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("linking", "grouping"):
        monkeypatch.setattr(f"keepstep.checkpoint.saving.{module}.LINKED_FROM_BYTES", 1)


def state(number: int) -> dict[str, Any]:
    """The same base every time beside an adapter that changes."""
    return {
        "base": {"w": torch.arange(3000.0), "b": torch.arange(7)},
        "adapter": {"w": torch.full((16,), float(number))},
        "train": {"step": number},
    }


def whole(checkpoint: Checkpoint | None) -> int:
    """The number of the state that a checkpoint holds, sound to the last byte."""
    assert checkpoint is not None
    report = checkpoint.verify()
    assert report.sound, report.problems
    loaded = checkpoint.load()
    number = loaded["train"]["step"]
    assert_same(loaded, state(number))
    return number


def base_of(checkpoint: Checkpoint | None) -> Path:
    assert checkpoint is not None
    return checkpoint.path / "base.safetensors"


def links(path: Path) -> int:
    return path.stat().st_nlink


def before(root: Path) -> None:
    store = Store(root)
    for number in (1, 2, 3):
        store.save(state(number), step=number)
    assert len({base_of(c).stat().st_ino for c in store.list()}) == 1


def resumed(root: Path, files: Any, **options: Any) -> Store:
    store = Store(root, files=files, **options)
    assert store.load_latest_into(state(0)) is not None
    return store


def in_background(staging: Staging) -> Callable[[Path, Any], None]:
    def act(root: Path, files: Any) -> None:
        store = resumed(root, files)
        for number in (4, 5):
            store.save_in_background(state(number), staging=staging)
        store.wait()

    return act


def _pruned(root: Path, files: Any) -> None:
    store = resumed(root, files, retention=Retention(keep_last=1))
    for number in (4, 5):
        store.save(state(number))


def _deleted_first(root: Path, files: Any) -> None:
    """What it resumed from, and would link to, is deleted before the save."""
    store = resumed(root, files)
    store.delete("checkpoint_2")
    store.save(state(4))
    store.save(state(5))


def holds(*allowed: int) -> Callable[[Path], None]:
    def check(root: Path) -> None:
        store = Store(root)
        newest = whole(store.latest())
        assert newest in allowed
        held = [whole(checkpoint) for checkpoint in store.list()]
        assert held == sorted(held)
        again = resumed(root, None)
        assert whole(again.save(state(8))) == 8
        assert whole(again.save(state(9))) == 9
        assert leftovers(root) == []
        names = [p for p in root.rglob("base.safetensors") if ".keepstep" not in p.parts]
        counts = {p.stat().st_ino: p.stat().st_nlink for p in names}
        assert sum(counts.values()) == len(names), "nothing else holds on to a deleted file"

    return check


SCENARIOS = {
    "awaited": Scenario(before, in_background("awaited"), holds(3, 4, 5)),
    "overlapped": Scenario(before, in_background("overlapped"), holds(3, 4, 5)),
    "pruned": Scenario(before, _pruned, holds(3, 4, 5)),
    "deleted first": Scenario(before, _deleted_first, holds(2, 3, 4, 5)),
}


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_at_every_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally, name: str, power_cut: bool
) -> None:
    done = kill_at_each_operation(tmp_path, monkeypatch, SCENARIOS[name], power_cut=power_cut)
    tally("operations at which the power was cut" if power_cut else "operations killed at", done)


@pytest.mark.parametrize("error", [NO_SPACE, IO_ERROR], ids=["full", "i/o"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_error_at_every_operation(tmp_path: Path, tally: Tally, name: str, error: OSError) -> None:
    tally("operations that failed", fail_at_each_operation(tmp_path, SCENARIOS[name], error))


def test_the_scenarios_do_link(tmp_path: Path) -> None:
    for name, scenario in SCENARIOS.items():
        operations = operations_of(tmp_path / name, scenario)
        assert "link base.safetensors" in operations, name


@pytest.mark.parametrize("staging", [None, "awaited", "overlapped"])
@pytest.mark.parametrize("error", [NO_SPACE, IO_ERROR], ids=["no space", "i/o error"])
def test_a_save_after_a_failed_one_links_to_what_was_committed(
    tmp_path: Path, tally: Tally, error: OSError, staging: Staging | None
) -> None:
    """The same store object goes on after an error at each operation of a save."""
    counting = FaultyFiles()
    store = Store(tmp_path / "whole", files=counting)
    store.save(state(1))
    first = len(counting.log)
    store.save(state(2))
    for at in range(first, len(counting.log)):
        files = FaultyFiles(at=at, error=error)
        store = Store(tmp_path / f"at{at}", files=files)
        store.save(state(1))
        try:
            if staging is None:
                store.save(state(2))
            else:
                store.save_in_background(state(2), staging=staging).wait()
        except (BackgroundSaveError, StoreError):
            store.wait()
        for number in (3, 4):
            assert whole(store.save(state(number))) == number, files.log[at]
        inodes = {base_of(checkpoint).stat().st_ino for checkpoint in store.list()}
        assert len(inodes) == 1 or files.log[at].startswith("link"), files.log[at]
        assert leftovers(tmp_path / f"at{at}") == []
        tally("operations that failed")


# ------------------------------------------------------------------- what a save would have linked to


def _cut(directory: Path) -> None:
    os.truncate(directory / "base.safetensors", 100)


def _grown(directory: Path) -> None:
    with (directory / "base.safetensors").open("ab") as file:
        file.write(b"more")


def _a_link(directory: Path) -> None:
    base = directory / "base.safetensors"
    base.rename(directory.parent / "elsewhere")
    base.symlink_to(directory.parent / "elsewhere")


def _a_directory(directory: Path) -> None:
    (directory / "base.safetensors").unlink()
    (directory / "base.safetensors").mkdir()


def _quarantined(directory: Path) -> None:
    place = directory.parent / ".keepstep" / "damaged"
    place.mkdir()
    directory.rename(place / directory.name)


SPOILED: dict[str, Callable[[Path], None]] = {
    "deleted": shutil.rmtree,
    "without its file": lambda directory: (directory / "base.safetensors").unlink(),
    "without its manifest": lambda directory: (directory / "manifest.json").unlink(),
    "truncated": _cut,
    "grown": _grown,
    "a symbolic link": _a_link,
    "a directory": _a_directory,
    "a fifo": lambda directory: (
        (directory / "base.safetensors").unlink(),
        os.mkfifo(directory / "base.safetensors"),
    )[0],
    "quarantined": _quarantined,
}


@pytest.mark.parametrize("staging", ["awaited", "overlapped"])
@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_it_would_link_to_is_gone_or_changed(tmp_path: Path, spoiled: str, staging: Staging) -> None:
    store = Store(tmp_path)
    store.save(state(1))
    second = store.save(state(2))
    SPOILED[spoiled](second.path)
    third = store.save_in_background(state(3), staging=staging).wait()
    assert whole(third) == 3
    assert links(base_of(third)) == 1, "it was written"
    fourth = store.save(state(4))
    assert whole(fourth) == 4
    assert links(base_of(fourth)) == 2, "linked to the third"


def test_a_number_that_was_given_to_another_checkpoint_meanwhile(tmp_path: Path) -> None:
    """Deleted by one store and taken by its next save, a name says nothing about the bytes behind it."""
    one, other = Store(tmp_path), Store(tmp_path)
    one.save(state(1))
    other.delete("checkpoint_0")
    changed = state(2)
    changed["base"]["w"] = changed["base"]["w"] + 1
    assert other.save(changed).name == "checkpoint_0"
    assert whole(one.save(state(3))) == 3


def test_damage_that_a_resume_found_is_not_linked_to(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(state(1))
    base = base_of(store.save(state(2)))
    data = bytearray(base.read_bytes())
    data[-1] ^= 1
    base.unlink()  # the first one's link stays sound
    base.write_bytes(data)
    taken = store.load_latest_into(state(0))
    assert taken is not None
    assert taken.name == "checkpoint_0"
    third = store.save(state(3))
    assert whole(third) == 3
    assert base_of(third).stat().st_ino == base_of(taken).stat().st_ino


# --------------------------------------------------------------------- file systems without hard links


def refusing(code: int, after: int = 0) -> Callable[..., None]:
    real, calls = os.link, [0]

    def link(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(code, os.strerror(code))
        real(*args, **kwargs)

    return link


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP, errno.EACCES, errno.EIO, errno.ESTALE]
)
def test_a_file_system_that_does_not_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, after: int
) -> None:
    monkeypatch.setattr(os, "link", refusing(code, after))
    store = Store(tmp_path, retention=Retention(keep_last=2))
    for number in range(1, 6):
        assert whole(store.save(state(number))) == number
    assert [whole(checkpoint) for checkpoint in store.list()] == [4, 5]
    assert {links(base_of(checkpoint)) for checkpoint in store.list()} == {1}
    assert leftovers(tmp_path) == []


def test_a_copy_that_is_cut_off_is_written_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without hard links the old file is read, which an old disk may refuse; the state is in memory still."""

    def copy(source: Path, target: Path, **_: Any) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    monkeypatch.setattr(shutil, "copy2", copy)
    store = Store(tmp_path)
    for number in (1, 2, 3):
        assert whole(store.save(state(number))) == number
    assert leftovers(tmp_path) == []
