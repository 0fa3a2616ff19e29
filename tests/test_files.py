"""Files that survive power cuts, on a real file system."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.forked import begin_fork, in_fork

import keepstep.files
from keepstep.checkpoint.saving.staging import Block
from keepstep.files import PAGE_BYTES, LocalFiles
from keepstep.locks import DirectoryLock, StoreLock


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def block(size: int, fill: int = 7) -> memoryview:
    memory = Block(-(-size // PAGE_BYTES) * PAGE_BYTES)
    memory.array[:] = fill
    return memory.view


def takes_direct(directory: Path) -> bool:
    """Whether this file system takes O_DIRECT."""
    segment = LocalFiles().create_segment(directory / "probe", 1)
    segment.abandon()
    (directory / "probe").unlink()
    return bool(segment._direct)  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 100_000])
def test_a_segment_has_its_exact_size(tmp_path: Path, size: int) -> None:
    segment = LocalFiles().create_segment(tmp_path / "s", size)
    if size:
        segment.write_at(block(size), 0)
    segment.finish()
    assert (tmp_path / "s").read_bytes() == b"\x07" * size


def test_several_threads_fill_a_segment(tmp_path: Path) -> None:
    segment = LocalFiles().create_segment(tmp_path / "s", 8 * PAGE_BYTES)
    threads = [
        threading.Thread(target=segment.write_at, args=(block(PAGE_BYTES, index), index * PAGE_BYTES))
        for index in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segment.finish()
    data = (tmp_path / "s").read_bytes()
    assert [data[index * PAGE_BYTES] for index in range(8)] == list(range(8))


def test_a_segment_of_several_files_is_synced_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    segment = LocalFiles().create_segment(tmp_path / "s", PAGE_BYTES, durable=False)
    segment.write_at(block(PAGE_BYTES), 0)
    segment.finish()
    assert synced == ([] if takes_direct(tmp_path) else ["s"])
    LocalFiles().sync(tmp_path, ["s"])
    assert {"s", tmp_path.name} <= set(synced)


def test_a_segment_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(FileExistsError):
        LocalFiles().create_segment(tmp_path / "s", 10)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        LocalFiles().create_segment(tmp_path / "link", 10)
    assert (tmp_path / "s").read_text() == "mine"


def test_abandoning_closes_and_may_come_twice(tmp_path: Path) -> None:
    before = open_files()
    segment = LocalFiles().create_segment(tmp_path / "s", 10)
    segment.abandon()
    segment.abandon()
    assert open_files() == before


def _refusing(name: str, code: int, times: int = 10**9) -> tuple[Callable[..., Any], list[int]]:
    """A system call that fails `times` times, and how often it was called."""
    real, calls = getattr(os, name), [0]

    def call(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] <= times:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    return call, calls


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: Any, flags: int, *rest: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, *rest, **kwargs))  # some make the name first
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return real(path, flags, *rest, **kwargs)

    monkeypatch.setattr(os, "open", no_direct)
    segment = LocalFiles().create_segment(tmp_path / "s", 5000)
    segment.write_at(block(5000), 0)
    segment.finish()
    assert (tmp_path / "s").read_bytes() == b"\x07" * 5000


def test_a_file_system_that_refuses_a_direct_write_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = LocalFiles().create_segment(tmp_path / "s", 5000)
    if not segment._direct:  # type: ignore[attr-defined]
        pytest.skip("this file system takes no O_DIRECT at all")
    refuse, calls = _refusing("pwrite", errno.EINVAL, times=1)
    monkeypatch.setattr(os, "pwrite", refuse)
    segment.write_at(block(5000), 0)
    segment.finish()
    assert calls[0] == 2
    assert (tmp_path / "s").read_bytes() == b"\x07" * 5000


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 3)], offset)
    )
    segment = LocalFiles().create_segment(tmp_path / "s", 20_000)
    segment.write_at(block(20_000), 0)
    segment.finish()
    assert (tmp_path / "s").read_bytes() == b"\x07" * 20_000


def test_a_full_disk_is_met_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = takes_direct(tmp_path)

    def refuse(fd: int, size_bytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(keepstep.files, "_allocate", refuse)
    before = open_files()
    with pytest.raises(OSError, match="No space") if direct else contextlib.nullcontext():
        LocalFiles().create_segment(tmp_path / "s", 5000).abandon()
    assert open_files() == before


def test_directories_that_cannot_be_synced_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse, _ = _refusing("fsync", errno.EINVAL)
    monkeypatch.setattr(os, "fsync", refuse)
    LocalFiles().sync_directory(tmp_path)
    refuse, _ = _refusing("fsync", errno.EIO)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        LocalFiles().sync_directory(tmp_path)


def test_a_failed_fsync_of_a_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segment = LocalFiles().create_segment(tmp_path / "s", 10)
    refuse, _ = _refusing("fsync", errno.EIO)
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        segment.finish()
    with pytest.raises(OSError, match="Input/output error"):
        LocalFiles().write_file(tmp_path / "f", b"x")


def test_links_fall_back_to_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("content")
    (tmp_path / "to").symlink_to("a")
    files = LocalFiles()
    files.link(tmp_path / "a", tmp_path / "hard")
    assert (tmp_path / "hard").stat().st_ino == (tmp_path / "a").stat().st_ino
    for code in (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP):
        refuse, _ = _refusing("link", code)
        monkeypatch.setattr(os, "link", refuse)
        files.link(tmp_path / "a", tmp_path / f"copy{code}")
        assert (tmp_path / f"copy{code}").read_text() == "content"
        files.link(tmp_path / "to", tmp_path / f"link{code}")
        assert (tmp_path / f"link{code}").readlink() == Path("a")
    refuse, _ = _refusing("link", errno.ENOSPC)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match="No space"):
        files.link(tmp_path / "a", tmp_path / "b")


def test_two_directories_swap_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    if not LocalFiles().exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system can't swap two names")
    assert (tmp_path / "a" / "who").read_text() == "b"
    with pytest.raises(FileNotFoundError):
        LocalFiles().exchange(tmp_path / "a", tmp_path / "nothing")


def test_removing_a_tree_follows_no_links(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "x").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "keep")
    LocalFiles().remove_tree(tmp_path / "tree")
    assert (tmp_path / "keep" / "x").exists()


def test_make_directory(tmp_path: Path) -> None:
    files = LocalFiles()
    files.make_directory(tmp_path / "a" / "b" / "c")
    files.make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        files.make_directory(tmp_path / "file")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        files.make_directory(tmp_path / "file" / "below")


def test_a_directory_lock_is_exclusive_and_let_go(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    with pytest.raises(BlockingIOError):
        DirectoryLock(tmp_path)
    lock.release()
    lock.release()
    DirectoryLock(tmp_path).release()


def test_a_forked_child_keeps_no_segment_open(tmp_path: Path) -> None:
    """Deleted by the parent, it would take room for as long as the child lives."""
    segment = LocalFiles().create_segment(tmp_path / "s", PAGE_BYTES)

    def look() -> None:
        inode = (tmp_path / "s").stat().st_ino
        assert not [fd for fd in Path("/proc/self/fd").iterdir() if _inode_of(fd) == inode]

    assert in_fork(look) == 0
    segment.write_at(block(PAGE_BYTES, 7), 0)
    segment.finish()
    assert (tmp_path / "s").read_bytes() == bytes([7]) * PAGE_BYTES


def _inode_of(fd: Path) -> int | None:
    try:
        return fd.stat().st_ino
    except OSError:
        return None


def _try_lock(path: str) -> str:
    return (StoreLock.acquire(Path(path), b"the child") or b"").decode()


def test_a_store_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    assert StoreLock.acquire(tmp_path / "lock", b"the parent") is None
    assert StoreLock.acquire(tmp_path / "lock", b"the parent") is None, "one process shares it"
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.apply(_try_lock, (str(tmp_path / "lock"),)) == "the parent"
            (tmp_path / "other").mkdir(exist_ok=True)
            assert pool.apply(_try_lock, (str(tmp_path / "other" / method),)) == ""


def _locked_elsewhere(path: Path) -> str:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return str(pool.apply(_try_lock, (str(path),)))


def test_a_store_lock_stays_when_the_process_reads_the_file(tmp_path: Path) -> None:
    """A backup of the directory, made by the run itself, opens and closes everything in it."""
    (tmp_path / "run").mkdir()
    assert StoreLock.acquire(tmp_path / "run" / "lock", b"the parent") is None
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    assert _locked_elsewhere(tmp_path / "run" / "lock") == "the parent"
    (tmp_path / "run").rename(tmp_path / "moved")
    assert StoreLock.acquire(tmp_path / "moved" / "lock", b"the parent") is None, "under its new name as well"


_FULL_DISK = """
import resource, sys
from pathlib import Path
from keepstep.locks import StoreLock

resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
try:
    StoreLock.acquire(Path(sys.argv[1]), b"one process")
except OSError as error:
    print("refused", error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
print(StoreLock.acquire(Path(sys.argv[1]), b"one process"))
"""


def test_a_store_lock_that_could_not_be_written_down_is_let_go(tmp_path: Path) -> None:
    """Else the process would keep itself out for good."""
    found = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "lock")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout.split("\n") == [f"refused {errno.EFBIG}", "None", ""], found.stderr


def test_a_store_lock_does_not_outlive_its_process_in_a_forked_worker(tmp_path: Path) -> None:
    forking = multiprocessing.get_context("fork")
    works, may_end = forking.Event(), forking.Event()

    def worker() -> None:
        works.set()
        may_end.wait(60)

    def parent() -> None:
        assert StoreLock.acquire(tmp_path / "lock", b"the parent") is None
        begin_fork(worker)

    assert in_fork(parent) == 0
    try:
        assert works.wait(60)
        assert _locked_elsewhere(tmp_path / "lock") == ""
    finally:
        may_end.set()


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("keepstep.locks.fcntl.lockf", refuse)
    monkeypatch.setattr("keepstep.locks.fcntl.fcntl", refuse)
    assert StoreLock.acquire(tmp_path / "lock", b"me") is None
    monkeypatch.setattr("keepstep.locks.fcntl.flock", refuse)
    lock = DirectoryLock(tmp_path)
    assert not lock.supported
    lock.release()


def test_importing_needs_no_torch() -> None:
    import subprocess

    code = "import sys, keepstep.files, keepstep.checkpoint.keeping.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
