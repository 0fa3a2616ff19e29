"""File systems that know no locks of any kind, as some of clusters are mounted: what stands in for them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keepstep import Store
from keepstep.checkpoint.place.local import sweep
from keepstep.errors import StoreBusyError
from keepstep.files import LocalFiles

PROGRAM = """
import errno, fcntl, os, sys

def refuse(*_):
    raise OSError(errno.ENOSYS, "no locks")

fcntl.flock = fcntl.lockf = fcntl.fcntl = refuse
from keepstep import Store
store = Store(sys.argv[1])
store.save({"x": 1})
workspace = store._backend.reserve()
workspace.open()
workspace.write_file("half", b"of it")
print("half", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of its second save."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "store")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    for name in ("fcntl", "flock", "lockf"):
        monkeypatch.setattr(f"keepstep.locks.fcntl.{name}", refuse)


def unfinished(place: Path) -> list[str]:
    return [path.name for path in place.iterdir() if ".tmp-" in path.name]


def test_one_process_of_a_machine_writes_and_what_a_dead_one_left_goes(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    place = tmp_path / "store"
    with pytest.raises(StoreBusyError, match=f"by process {other.pid} on "):
        Store(place).save({"x": 2})
    assert len(unfinished(place)) == 1
    other.kill()
    other.wait()
    store = Store(place)
    assert store.save({"x": 2}).name == "checkpoint_1"
    assert unfinished(place) == []
    assert [report.sound for report in store.verify()] == [True, True]


def test_what_this_process_is_saving_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.save({"x": 1})
    workspace = store._backend.reserve()
    workspace.open()
    (tmp_path / "store" / ".keepstep" / "lock").unlink()  # so that the next one claims anew
    Store(tmp_path / "store").save({"x": 2})
    assert len(unfinished(tmp_path / "store")) == 1
    workspace.commit(b"{}")


def test_what_another_machine_may_be_saving_stays(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    place = tmp_path / "store"
    other.kill()
    other.wait()
    lock = place / ".keepstep" / "lock"
    said = lock.read_text()
    lock.write_text(said.replace('"host": "', '"host": "another-'))
    Store(place).save({"x": 2})
    assert len(unfinished(place)) == 1


def test_what_was_left_unfinished_a_day_ago_goes_whoever_left_it(tmp_path: Path) -> None:
    """Containers that start again under one name can't tell whether their predecessor lives."""
    left = [tmp_path / f"checkpoint_{number}.tmp-{number:012x}" for number in (1, 2)]
    for directory in left:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
    long_ago = time.time() - 25 * 3600
    for path in (left[0] / "model.safetensors", left[0]):
        os.utime(path, (long_ago, long_ago))
    sweep(LocalFiles(), tmp_path)
    assert [directory.exists() for directory in left] == [False, True]
