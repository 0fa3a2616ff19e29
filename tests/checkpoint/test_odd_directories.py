"""Links, directories in place of files, and things of other people's in a store."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

import keepstep
from keepstep import Checkpoint, Store, save_directory
from keepstep.checkpoint.place.local import replaced_path, sweep
from keepstep.errors import StoreError
from keepstep.files import LocalFiles


def moved_away(store: Store, archive: Path) -> Path:
    """The oldest checkpoint, moved elsewhere, with a link in its place."""
    archive.mkdir()
    name = store.list()[0].name
    target = (store.path / name).rename(archive / name)
    (store.path / name).symlink_to(target)
    return target


def test_deleting_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.save({"x": 1})
    target = moved_away(store, tmp_path / "archive")
    store.save({"x": 2})
    store.delete("checkpoint_0")
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_1"]
    assert (target / "manifest.json").is_file()
    assert (target / "state.json").is_file()


def test_what_refuses_to_go_keeps_no_run_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stubborn(LocalFiles):
        def remove_tree(self, path: Path) -> None:
            raise OSError(16, "Device or resource busy")

        def remove_directory(self, path: Path) -> None:
            raise OSError(16, "Device or resource busy")

    (tmp_path / "checkpoint_0.tmp-0123456789ab").mkdir()
    (tmp_path / ".keepstep" / "trash" / "checkpoint_5.00000000").mkdir(parents=True)
    (tmp_path / ".keepstep" / "trash" / "link").symlink_to(tmp_path)
    assert Store(tmp_path, files=Stubborn()).save({"x": 1}).load() == {"x": 1}
    assert "busy" in caplog.text


class HeldOpen(LocalFiles):
    """On NFS a file that is still open leaves its directory one of another name, and that stays."""

    def __init__(self, *, exchange: bool = True) -> None:
        self.held = True
        self._exchange = exchange

    def exchange(self, first: Path, second: Path) -> bool:
        return self._exchange and super().exchange(first, second)

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        if self.held:
            path.mkdir()
            (path / ".nfs0001").touch()
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))


def by_save_directory(path: Path, value: int, files: LocalFiles) -> None:
    save_directory(path, {"x": torch.tensor([value])}, files=files)


def by_dcp(path: Path, value: int, files: LocalFiles) -> None:
    writer = keepstep.dcp.StorageWriter(path, files=files)
    torch_dcp.save({"x": torch.tensor([value])}, storage_writer=writer, no_dist=True)


def value(path: Path) -> int:
    return int(Checkpoint.open(path).load()["x"])


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "two renames"])
@pytest.mark.parametrize("save", [by_save_directory, by_dcp])
def test_a_checkpoint_is_saved_though_the_one_in_its_place_does_not_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, save: Callable[..., None], exchange: bool
) -> None:
    files, best = HeldOpen(exchange=exchange), tmp_path / "best"
    for number in range(3):
        save(best, number, files)
        assert value(best) == number
    assert "Directory not empty" in caplog.text
    assert len(list(tmp_path.iterdir())) > 1
    files.held = False
    save(best, 3, files)
    assert value(best) == 3
    assert list(tmp_path.iterdir()) == [best], "what did not go was not tried again"


def test_a_save_is_made_though_what_a_dead_one_replaced_does_not_go(tmp_path: Path) -> None:
    files, best = HeldOpen(), tmp_path / "best"
    by_save_directory(best, 1, files)
    shutil.copytree(best, replaced_path(best))
    by_save_directory(best, 2, files)
    assert value(best) == 2
    files.held = False
    by_save_directory(best, 3, files)
    assert list(tmp_path.iterdir()) == [best]


def test_a_sweep_passes_over_links_and_over_what_is_in_flight(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    store = tmp_path / "store"
    (store / "checkpoint_1.tmp-0123456789ab").mkdir(parents=True)
    (store / "checkpoint_2.tmp-0123456789ab").mkdir()
    (store / "checkpoint_3.tmp-0123456789ab").symlink_to(precious)
    sweep(LocalFiles(), store, in_flight=lambda name: name == "checkpoint_1")
    assert sorted(path.name for path in store.iterdir()) == [
        "checkpoint_1.tmp-0123456789ab",
        "checkpoint_3.tmp-0123456789ab",
    ]
    assert precious.is_dir()


def test_a_store_whose_directory_was_moved_away_is_locked_anew(tmp_path: Path) -> None:
    """The lock went with the old directory; a second process must not write beside this one."""
    store = Store(tmp_path / "run")
    store.save({"x": 1})
    (tmp_path / "run").rename(tmp_path / "old")
    store.save({"x": 2})
    code = f"from keepstep import Store; Store({str(tmp_path / 'run')!r}).save({{'x': 3}})"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    told = r"StoreBusyError: .* is being written to by process \d+ on \S+, since 20\d\d-.* UTC\. One process"
    assert re.search(told, other.stderr)
    assert [checkpoint.load() for checkpoint in store.list()] == [{"x": 2}]


def test_a_checkpoint_whose_manifest_is_damaged_is_not_said_to_be_deleted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"x": 1})
    (tmp_path / "checkpoint_0" / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="manifest can't be read"):
        store.delete("checkpoint_0")
    assert (tmp_path / "checkpoint_0" / "state.json").is_file()
