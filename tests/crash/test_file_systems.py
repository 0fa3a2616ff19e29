"""Stores on real file systems other than the machine's own: kills, links, retention, replacing, a full disk.

Some have no hard links, no fallocate, or blocks of an odd size. Needs root, and the tools of each.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.crash.harness import leftovers

from keepstep import Checkpoint, Store, save_directory
from keepstep.errors import NoSpaceError
from keepstep.files import LocalFiles

MIB = 1 << 20
pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Kind:
    """How a file system is made and mounted.

    Attributes:
        mebibytes: size of its image; 0 if it has none.
        make: the command that formats the image.
        mount: the command that mounts it; the image, or a device for it, and the place are added.
        loop: whether `mount` needs a device.
        links: whether it has hard links.
        exchanges: whether two names can be swapped at once.
    """

    mebibytes: int
    make: tuple[str, ...]
    mount: tuple[str, ...]
    loop: bool = False
    links: bool = True
    exchanges: bool = True


KINDS = {
    "xfs": Kind(320, ("mkfs.xfs", "-q"), ("mount", "-o", "loop")),
    "btrfs": Kind(256, ("mkfs.btrfs", "-q"), ("mount", "-o", "loop")),
    "ext4 of 4 KiB blocks": Kind(200, ("mkfs.ext4", "-q", "-m", "0", "-b", "4096"), ("mount", "-o", "loop")),
    "ext4 of 1 KiB blocks": Kind(200, ("mkfs.ext4", "-q", "-m", "0", "-b", "1024"), ("mount", "-o", "loop")),
    "tmpfs": Kind(0, (), ("mount", "-t", "tmpfs", "-o", "size=200m", "none")),
    "overlay": Kind(0, (), ("mount", "-t", "overlay", "-o", "{overlay}", "none")),
    "ntfs": Kind(200, ("mkfs.ntfs", "-q", "-F", "-f"), ("ntfs-3g",), exchanges=False),
    "exfat": Kind(200, ("mkfs.exfat",), ("mount.exfat-fuse",), loop=True, links=False, exchanges=False),
}


NOT_HERE = (
    *("operation not permitted", "permission denied", "unknown filesystem type"),
    *("cannot find an unused loop device", "failed to setup loop device", "fuse device", "/dev/fuse"),
)
"""What tools say where the kernel has no such file system, or the container may not mount it."""


def run(*command: str) -> str:
    if not shutil.which(command[0]):
        pytest.skip(f"there is no {command[0]} here")
    english = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, check=False, text=True, env=english)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:]
        if any(words in said.lower() for words in NOT_HERE):
            pytest.skip(f"this kernel, or container, mounts no such file system: {said}")
        pytest.fail(f"{' '.join(command)}: {said}")
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(kind: Kind, room: Path) -> Iterator[Path]:
    """A file system of a kind, gone again afterwards."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    place, image = room / "disk", room / "image"
    place.mkdir()
    with contextlib.ExitStack() as undo:
        source = []
        if kind.mebibytes:
            image.touch()
            os.truncate(image, kind.mebibytes * MIB)
            run(*kind.make, str(image))
            source = [str(image)]
        if kind.loop:
            source = [run("losetup", "-f", "--show", str(image))]
            undo.callback(subprocess.run, ["losetup", "-d", *source], check=True)
        layers = ["lower", "upper", "work"] if "overlay" in kind.mount else []
        if layers and run("stat", "-f", "-c", "%T", str(room)) == "overlayfs":
            pytest.skip("the temporary directory lies on an overlay, which takes no second one on top")
        for layer in layers:
            (room / layer).mkdir()
        said = ",".join(f"{layer}dir={room / layer}" for layer in layers)
        command = [part.format(overlay=said) if layers else part for part in kind.mount]
        run(*command, *source, str(place))
        undo.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
        yield place


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Kind, Path]]:
    kind = KINDS[request.param]
    with mounted(kind, tmp_path) as place:
        yield kind, place


PROGRAM = """
import sys, torch
from keepstep import Retention, Store
torch.set_num_threads(1)
store = Store(sys.argv[1], retention=Retention(keep_last=3))
base = torch.arange(600_000.0)
live = {"base": {"frozen": torch.zeros(600_000)}, "model": {"w": torch.zeros(300_001)}, "step": 0}
if store.load_latest_into(live) is not None:
    assert torch.equal(live["base"]["frozen"], base)
    assert (live["model"]["w"] == live["step"]).all()
print(live["step"], flush=True)
for step in range(live["step"] + 1, live["step"] + 1 + int(sys.argv[2])):
    live["step"] = step
    live["model"]["w"].fill_(step)
    state = {**live, "base": {"frozen": base}}
    if step % 2:
        store.save(state, step=step)
    else:
        store.save_in_background(state, step=step).wait()
    print(step, flush=True)
"""


def train(store: Path, steps: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(store), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_of(process: subprocess.Popen[str]) -> list[int]:
    output, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    assert "Traceback" not in errors, errors
    return [int(line) for line in output.split()]


def test_a_run_that_is_killed_goes_on_where_it_was(disk: tuple[Kind, Path]) -> None:
    kind, place = disk
    done = 0
    for delay_s in (0.3, 0.77):
        process = train(place / "store", 10_000)
        assert process.stdout is not None
        started = int(process.stdout.readline())
        assert started in (done, done + 1), "a checkpoint was committed, and is gone"
        second = train(place / "store", 1)
        _, refused = second.communicate()
        assert second.returncode != 0
        assert "StoreBusyError" in refused
        time.sleep(delay_s)
        process.kill()
        done = max([started, *steps_of(process)])
        assert all(report.sound for report in Store(place / "store").verify())
    told = steps_of(train(place / "store", 3))
    assert told[0] in (done, done + 1)
    assert leftovers(place / "store") == []
    kept = Store(place / "store").list()
    assert [checkpoint.step for checkpoint in kept] == told[-3:]
    for checkpoint in kept:
        assert checkpoint.verify().sound
        assert (checkpoint.path / "base.safetensors").stat().st_nlink == (3 if kind.links else 1)
    Store(place / "store").delete(kept[0].name)
    assert kept[-1].verify().sound


def test_a_directory_is_replaced_and_room_is_reserved_without_writing(disk: tuple[Kind, Path]) -> None:
    kind, place = disk
    for number in range(3):
        save_directory(place / "same", {"w": torch.full((10_000,), float(number))})
        (place / "same" / "note.txt").write_text("mine")
    assert Checkpoint.open(place / "same").load()["w"][0] == 2
    assert (place / "same" / "note.txt").read_text() == "mine"
    assert [path.name for path in place.glob("same*")] == ["same"]
    (place / "other").mkdir()
    assert LocalFiles().exchange(place / "same", place / "other") is kind.exchanges, "docs/keeping.md says so"

    def written() -> int:
        said = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(said["syscw"])

    before = written()
    LocalFiles().create_segment(place / "segment", 64 * MIB).abandon()
    assert written() - before < 100, "a byte was written into each block"


def test_a_disk_that_fills_up_at_any_stage_of_a_save(tmp_path: Path) -> None:
    """Each time nothing but that save is lost, and when there is room again the next one is made."""

    def state(number: int) -> dict[str, Any]:
        return {"model": {"w": torch.full((500_000,), float(number))}, "base": torch.arange(300_000.0)}

    kind = Kind(40, ("mkfs.ext4", "-q", "-m", "0"), ("mount", "-o", "loop"))
    refused = 0
    with mounted(kind, tmp_path) as place:
        store = Store(place / "store")  # no rules: what they drop would make room
        store.save(state(0))
        near = range(1_990_000, 2_040_000, 10_000)  # the last file, a directory, a name
        for number, left in enumerate((0, 4096, 100_000, 1_000_000, *near), start=1):
            fill(place, left)
            before = [checkpoint.name for checkpoint in store.list()]
            try:
                store.save(state(number))
            except NoSpaceError:
                refused += 1
                assert [checkpoint.name for checkpoint in store.list()] == before
            assert all(report.sound for report in store.verify())
            assert leftovers(store.path) == []
            (place / "filler").unlink()
            for old in store.list()[:-2]:
                store.delete(old.name)
            assert torch.equal(store.save(state(-number)).load()["model"]["w"], state(-number)["model"]["w"])
    assert 4 <= refused < 4 + len(near)


def fill(place: Path, left_bytes: int) -> None:
    """Leave so much room."""
    with (place / "filler").open("wb") as file:
        end = 0
        for chunk in (MIB, 1 << 16, 4096, 1024):
            while shutil.disk_usage(place).free - left_bytes >= chunk:
                try:
                    os.posix_fallocate(file.fileno(), end, chunk)
                except OSError:
                    break
                end += chunk
