"""Disks that are full, limited or failing to read, and clocks that go backwards."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import fcntl
import os
import resource
import shutil
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.equality import assert_same
from tests.checkpoint.test_parse import rewrite
from tests.crash.harness import leftovers
from tests.crash.tally import Tally

from keepstep.checkpoint.in_flight import Staging
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    BackgroundSaveError,
    DamagedCheckpointError,
    NoSpaceError,
    NoValidCheckpointError,
    StoreError,
)

MIB = 1 << 20


def state(number: int, *, mebibytes: int = 1) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((mebibytes * MIB // 4,), float(number)), "b": torch.arange(5) + number},
        "step": number,
    }


def whole(checkpoint: Checkpoint | None, *, mebibytes: int = 1) -> int:
    assert checkpoint is not None
    report = checkpoint.verify()
    assert report.sound, report.problems
    loaded = checkpoint.load()
    assert_same(loaded, state(loaded["step"], mebibytes=mebibytes))
    return int(loaded["step"])


def save(store: Store, number: int, staging: Staging | None, *, mebibytes: int = 1) -> Checkpoint:
    """Save in one of three ways; the error is that of the save itself."""
    if staging is None:
        return store.save(state(number, mebibytes=mebibytes), step=number)
    try:
        return store.save_in_background(
            state(number, mebibytes=mebibytes), step=number, staging=staging
        ).wait()
    except BackgroundSaveError as error:
        raise error.__cause__ or error from None


WAYS: list[Staging | None] = [None, "awaited", "overlapped"]

# ------------------------------------------------------------------------------------ a disk that is full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place)],
        capture_output=True,
        check=False,
        text=True,
    )
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("staging", WAYS)
def test_a_disk_that_is_full(small_disk: Path, tally: Tally, staging: Staging | None) -> None:
    store = Store(small_disk / "store")
    for number in (1, 2, 3):
        save(store, number, staging, mebibytes=2)
    with pytest.raises(NoSpaceError, match="Other checkpoints are whole"):
        save(store, 4, staging, mebibytes=2)
    tally("saves that met a disk that was full")
    assert [whole(c, mebibytes=2) for c in store.list()] == [1, 2, 3]
    assert leftovers(store.path) == []
    store.delete("checkpoint_0")
    assert whole(save(store, 9, staging, mebibytes=2), mebibytes=2) == 9
    assert [whole(c, mebibytes=2) for c in store.list()] == [2, 3, 9]


def test_a_full_disk_is_no_obstacle_to_links(small_disk: Path) -> None:
    """What did not change needs no room."""
    store = Store(small_disk / "store")
    frozen = torch.arange(1_200_000, dtype=torch.float32)  # more than half of the disk
    for number in range(5):
        saved = store.save({"base": {"w": frozen}, "adapter": {"w": torch.full((9,), number)}})
        assert saved.verify().sound
    assert len({(c.path / "base.safetensors").stat().st_ino for c in store.list()}) == 1


def test_retention_keeps_a_small_disk_going(small_disk: Path) -> None:
    store = Store(small_disk / "store", retention=Retention(keep_last=1))
    for number in range(1, 12):
        assert whole(store.save(state(number, mebibytes=2)), mebibytes=2) == number
    assert len(store.list()) == 1


def test_a_disk_without_a_single_free_block_can_be_read_and_cleared(small_disk: Path) -> None:
    store = Store(small_disk / "store")
    store.save(state(1))
    store.save(state(2))
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    assert not shutil.disk_usage(small_disk).free
    with pytest.raises(NoSpaceError):
        store.save(state(3))
    live = state(0)
    assert Store(small_disk / "store").load_latest_into(live) is not None
    assert_same(live, state(2))
    store.delete("checkpoint_0")
    assert whole(store.save(state(4))) == 4


@pytest.mark.parametrize("staging", WAYS)
def test_a_limit_on_the_size_of_files(tmp_path: Path, staging: Staging | None) -> None:
    """As a quota, or ulimit -f: every write beyond it is refused."""
    store = Store(tmp_path)
    save(store, 1, staging)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, before[1]))
    try:
        with pytest.raises(StoreError, match=r"[Ff]ile too large"):
            save(store, 2, staging)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [whole(c) for c in store.list()] == [1]
    assert leftovers(tmp_path) == []
    assert whole(save(store, 3, staging)) == 3


# ----------------------------------------------------------------------------------- a full byte budget


@pytest.mark.parametrize("staging", WAYS)
def test_a_byte_budget_that_is_always_full(tmp_path: Path, staging: Staging | None) -> None:
    size = Store(tmp_path / "one").save(state(0)).bytes
    store = Store(tmp_path / "store", retention=Retention(byte_budget=size * 5 // 2))
    for number in range(1, 9):
        save(store, number, staging)
        assert [whole(c) for c in store.list()] == [n for n in (number - 1, number) if n >= 1]


def test_a_budget_smaller_than_one_checkpoint_keeps_the_newest(tmp_path: Path) -> None:
    store = Store(tmp_path, retention=Retention(byte_budget=1000))
    for number in (1, 2, 3):
        store.save(state(number))
        assert [whole(c) for c in store.list()] == [number]


def test_a_budget_never_takes_what_is_pinned_or_tagged(tmp_path: Path) -> None:
    store = Store(tmp_path, retention=Retention(byte_budget=1000, keep_last=5))
    store.save(state(1), pinned=True)
    store.save(state(2), tags=["mine"])
    for number in (3, 4, 5):
        store.save(state(number))
    assert [whole(c) for c in store.list()] == [1, 2, 5]


# -------------------------------------------------------------------------------- a disk that can't read


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 on a file, the end of which can be cut off: what lay there can't be read any more."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    commands = (
        ["mkfs.ext4", "-q", "-O", "^has_journal", str(image)],
        ["mount", "-o", "loop", str(image), str(place)],
    )
    for command in commands:
        if not shutil.which(command[0]):
            pytest.skip(f"there is no {command[0]} here")
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def last_byte_of(path: Path) -> int:
    """Where the file's last block ends on its disk, as FIEMAP tells it."""
    answer = bytearray(struct.pack("=QQLLLL", 0, 1 << 62, 1, 0, 64, 0) + bytes(64 * 56))
    with path.open("rb") as file:
        fcntl.ioctl(file, 0xC020660B, answer)
    (count,) = struct.unpack_from("=L", answer, 20)
    extents = [struct.unpack_from("=QQQ", answer, 32 + 56 * n) for n in range(count)]
    return max(physical + length for _, physical, length in extents)


def test_a_disk_that_really_fails_is_survived(failing_disk: Path, tmp_path: Path) -> None:
    """In a process of its own: a disk that fails under a mapping would kill it."""
    store = Store(failing_disk / "store")
    for number in (1, 2):
        store.save(state(number, mebibytes=8))
    segments = [checkpoint.path / "model.safetensors" for checkpoint in store.list()]
    ends = list(map(last_byte_of, segments))
    bad = segments[ends.index(max(ends))].parent
    for segment in segments:
        with segment.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.truncate(tmp_path / "image", max(ends) - 2 * MIB)
    script = textwrap.dedent(
        """
        import sys
        import torch
        from keepstep import Store
        from keepstep.checkpoint.version import Checkpoint
        from keepstep.errors import DamagedCheckpointError
        try:
            Checkpoint.open(sys.argv[2]).load()
        except DamagedCheckpointError as error:
            assert "Input/output error" in str(error), error
        else:
            raise SystemExit("it was taken for sound")
        live = {"model": {"w": torch.zeros(2 << 20), "b": torch.zeros(5, dtype=torch.int64)}, "step": 0}
        print(Store(sys.argv[1]).load_latest_into(live).name, live["step"])
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.path), str(bad)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    sound = {"checkpoint_0", "checkpoint_1"} - {bad.name} if bad.name == "checkpoint_1" else {"checkpoint_1"}
    assert done.stdout.split()[0] in sound


class BadSectors:
    """`preadv`, `pread` and `read` refuse some files of a checkpoint, as a disk does that is failing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: set[str] = set()
        self.code = errno.EIO
        self.beyond = 0
        self._patch(monkeypatch)

    def _patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_preadv, real_pread = os.preadv, os.pread

        def preadv(fd: int, buffers: Any, offset: int, *more: Any) -> int:
            self._refuse(fd, offset + sum(map(len, buffers)))
            return real_preadv(fd, buffers, offset, *more)

        def pread(fd: int, size: int, offset: int) -> bytes:
            self._refuse(fd, offset + size)
            return real_pread(fd, size, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "pread", pread)

    def _refuse(self, fd: int, end: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if f"{path.parent.name}/{path.name}" in self.names and end > self.beyond:
            raise OSError(self.code, os.strerror(self.code))


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> BadSectors:
    return BadSectors(monkeypatch)


@pytest.mark.parametrize("beyond", [0, 4096, 500_000])
def test_a_bad_sector_is_named_and_the_older_checkpoint_taken(
    tmp_path: Path, bad: BadSectors, beyond: int
) -> None:
    store = Store(tmp_path)
    for number in (1, 2, 3):
        store.save(state(number))
    bad.names = {"checkpoint_2/model.safetensors"}
    bad.beyond = beyond
    with pytest.raises(
        DamagedCheckpointError, match=r"model\.safetensors.*can't be read.*Input/output error"
    ):
        Checkpoint.open(tmp_path / "checkpoint_2").load_into(state(0))
    with pytest.raises(DamagedCheckpointError, match=r"can't be read.*Input/output error"):
        Checkpoint.open(tmp_path / "checkpoint_2").load()
    report = Checkpoint.open(tmp_path / "checkpoint_2").verify()
    assert not report.sound
    assert "Input/output error" in report.problems[0]
    live = state(0)
    taken = Store(tmp_path).load_latest_into(live)
    assert taken is not None
    assert taken.name == "checkpoint_1"
    assert_same(live, state(2))
    aside = tmp_path / ".keepstep" / "damaged" / "checkpoint_2"
    assert sorted(p.name for p in aside.iterdir()) == ["manifest.json", "model.safetensors", "state.json"]
    bad.names.clear()
    assert whole(Checkpoint.open(aside)) == 3, "nothing of it was thrown away"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_system_that_refuses_to_read_says_nothing_about_the_bytes(
    tmp_path: Path, bad: BadSectors, code: int
) -> None:
    store = Store(tmp_path)
    store.save(state(1))
    store.save(state(2))
    bad.names, bad.code = {"checkpoint_1/model.safetensors"}, code
    with pytest.raises(StoreError, match="was not set aside and no older checkpoint was taken"):
        Store(tmp_path).load_latest_into(state(0))
    bad.names.clear()
    assert [whole(c) for c in Store(tmp_path).list()] == [1, 2]
    assert not (tmp_path / ".keepstep" / "damaged").exists()


def test_a_disk_that_reads_nothing_any_more_is_not_taken_for_a_first_start(
    tmp_path: Path, bad: BadSectors
) -> None:
    store = Store(tmp_path)
    store.save(state(1))
    store.save(state(2))
    bad.names = {f"checkpoint_{n}/model.safetensors" for n in range(2)}
    with pytest.raises(NoValidCheckpointError, match=r"checkpoint_0.*Input/output error"):
        Store(tmp_path).load_latest_into(state(0))
    bad.names.clear()
    found = sorted((tmp_path / ".keepstep" / "damaged").iterdir())
    assert [whole(Checkpoint.open(path)) for path in found] == [1, 2]


# ------------------------------------------------------------------------------- clocks that go backwards


class Clock(dt.datetime):
    """A wall clock that each look sets back by a day."""

    days = 0

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> dt.datetime:  # type: ignore[override]
        cls.days += 1
        return dt.datetime(2030, 1, 1, tzinfo=tz) - dt.timedelta(days=cls.days)


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dt, "datetime", Clock)


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("staging", WAYS)
def test_order_comes_from_numbers_and_not_from_clocks(tmp_path: Path, staging: Staging | None) -> None:
    store = Store(tmp_path, retention=Retention(keep_last=3))
    for number in range(1, 7):
        save(store, number, staging)
    found = store.list()
    times = [checkpoint.created_at for checkpoint in found]
    assert times == sorted(times, reverse=True), "the clock did go backwards"
    assert [whole(c) for c in found] == [4, 5, 6]
    assert whole(store.latest()) == 6
    live = state(0)
    resumed = Store(tmp_path)
    assert resumed.load_latest_into(live) is not None
    assert_same(live, state(6))
    assert resumed.save(state(7)).name == "checkpoint_6"


AGED = [
    Retention(keep_last=1, keep_every_n_steps=2),
    Retention(keep_best=("loss", "min", 1)),
    Retention(keep_last=1, byte_budget=10 * MIB),
    Retention(keep_within_s=3600.0),
]


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("retention", AGED)
def test_the_newest_is_kept_though_it_is_the_oldest_by_the_clock(
    tmp_path: Path, retention: Retention
) -> None:
    store = Store(tmp_path, retention=retention)
    for number in range(1, 7):
        store.save(state(number), step=number, metrics={"loss": -float(number)})
        assert whole(store.latest()) == number


def test_a_file_system_clock_in_the_past_and_in_the_future(tmp_path: Path) -> None:
    store = Store(tmp_path, retention=Retention(keep_last=2))
    for number, when in ((1, 4_000_000_000), (2, 1), (3, 2_000_000_000)):
        saved = store.save(state(number))
        for path in [*saved.path.iterdir(), saved.path]:
            os.utime(path, (when, when))
    assert [whole(c) for c in Store(tmp_path).list()] == [2, 3]
    assert whole(Store(tmp_path).latest()) == 3


def test_times_that_are_no_times_do_no_harm(tmp_path: Path) -> None:
    """`created_at` is for people; a checkpoint from a machine without a clock is as good as any."""
    script = textwrap.dedent(
        """
        import datetime as dt, sys
        class Broken(dt.datetime):
            @classmethod
            def now(cls, tz=None):
                return dt.datetime(1, 1, 1, tzinfo=tz)
        dt.datetime = Broken
        import torch
        from keepstep import Store
        Store(sys.argv[1]).save({"step": 1})
        """
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    store = Store(tmp_path, retention=Retention(keep_last=1))
    assert store.list()[0].created_at.startswith("0001-01-01")
    store.save(state(2))
    assert [whole(c) for c in store.list()] == [2]


@pytest.mark.parametrize(
    "said",
    ["", "yesterday", "0001-01-01T00:00:00", "9999-12-31T23:59:59-23:59", "2030-01-01", "\ud800", "1" * 5000],
)
def test_a_time_that_cannot_be_read_neither_stops_a_save_nor_loses_one(tmp_path: Path, said: str) -> None:
    store = Store(tmp_path, retention=Retention(keep_within_s=3600.0))
    first = store.save(state(1))
    rewrite(first.path, lambda manifest, _: manifest.update(created_at=said))
    for number in (2, 3):
        store.save(state(number))
    assert [whole(c) for c in store.list()][-2:] == [2, 3]
