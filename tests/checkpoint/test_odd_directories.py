"""Links, directories in place of files, and things of other people's in a store."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from keepstep import Store
from keepstep.checkpoint.place.local import sweep
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
