"""Directories that users hand over: kept file by file, linked, adopted, refused, killed at any instant."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from obstore.store import MemoryStore
from tests.checkpoint.faults import NO_SPACE, FaultyFiles
from tests.crash.harness import Scenario, fail_at_each_operation, kill_at_each_operation, leftovers

from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.place.backend import Backend, Workspace
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.checkpoint.place.objects import Objects
from keepstep.checkpoint.pulling import pull_if_newer
from keepstep.checkpoint.saving.copying import Copier
from keepstep.checkpoint.saving.description import Lineage, describe
from keepstep.checkpoint.saving.handed_over import Committed, save_handed_over
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.uploading import upload_checkpoint
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    CheckpointNotFoundError,
    DirectoryNotOursError,
    DirectoryNotSavableError,
    StoreError,
    UsageError,
)
from keepstep.files import LocalFiles, SegmentFile

MIB = 1 << 20
ODD = "ü x%23#?{}[]+&~^`|<>\"';:,@!$*\\ .bin"


def save(
    workspace: Workspace, source: Path, *, step: int = 1, previous: Committed | None = None, **said: Any
) -> Manifest:
    description = describe(
        step=step,
        epoch=None,
        metrics=said.get("metrics"),
        tags=(),
        pinned=False,
        environment=said.get("more"),
    )
    return save_handed_over(
        workspace, source, description, Lineage(run="run"), copier=Copier(), previous=previous
    )


def made(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def below(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def content(place: Place) -> dict[str, bytes]:
    found = {}
    for name, entry in read_manifest(place).files.items():
        file = source_of(place).open(name, entry)
        try:
            found[name] = file.read(0, entry.bytes)
        finally:
            file.close()
    return found


@pytest.fixture(params=["directory", "bucket"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "directory":
        return LocalBackend(LocalFiles(), tmp_path / "store")
    return BucketBackend(Objects(MemoryStore(), "memory://run"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files that are empty, small, as large as a block and larger, and directories without any."""
    large = os.urandom(17 * MIB + 5)
    files = {
        "large": large,
        "a/b/c/block": large[: 8 * MIB],
        "a/small": b"x" * 4097,
        "none": b"",
        ODD: b"odd",
    }
    made(tmp_path / "source", files)
    (tmp_path / "source" / "empty" / "inner").mkdir(parents=True)
    return tmp_path / "source"


# ------------------------------------------------------------------------------------- what is kept


def test_every_file_is_kept_with_its_digest_wherever_it_is_saved(backend: Backend, source: Path) -> None:
    backend.claim()
    workspace = backend.reserve()
    manifest = save(workspace, source, step=7, metrics={"loss": 0.5})
    backend.release(workspace)
    ((number, place),) = backend.checkpoints()
    assert number == 0
    assert read_manifest(place) == manifest
    assert (manifest.step, manifest.metrics) == (7, {"loss": 0.5})
    assert manifest.directories == ("files/empty/inner",)
    expected = {f"files/{p.relative_to(source)}": p.read_bytes() for p in source.rglob("*") if p.is_file()}
    assert content(place) == expected
    for name, entry in manifest.files.items():
        assert entry.digest == xxhash.xxh3_128_hexdigest(expected[name])
    report = verify_checkpoint(place)
    assert report.sound, report.problems
    assert report.bytes == sum(map(len, expected.values()))
    backend.delete(place)
    assert backend.checkpoints() == []
    if isinstance(place, Path):
        assert not place.exists()
        assert leftovers(place.parent) == []


def test_an_empty_directory_is_a_checkpoint(backend: Backend, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    backend.claim()
    workspace = backend.reserve()
    assert save(workspace, tmp_path / "nothing").directories == ("files",)
    ((_, place),) = backend.checkpoints()
    assert verify_checkpoint(place).sound
    backend.delete(place)
    assert backend.checkpoints() == []


def test_what_did_not_change_is_linked(backend: Backend, tmp_path: Path) -> None:
    """A file that differs in one byte, wherever it is, is written."""
    backend.claim()
    files = {name: os.urandom(3 * MIB) for name in ("deep/frozen", "head")} | {"small": b"same"}
    source = made(tmp_path / "source", files)
    previous = None
    inodes = []
    for step in range(3):
        made(source, {"head": files["head"][:1_000_003] + bytes([step]) + files["head"][1_000_004:]})
        workspace = backend.reserve()
        manifest = save(workspace, source, step=step, previous=previous)
        backend.release(workspace)
        previous = Committed(place=workspace.final, manifest=manifest)
        inodes.append(set(source_of(workspace.final).held(manifest.files)))
        assert content(workspace.final)["files/head"][1_000_003] == step
    shared = inodes[0] & inodes[1] & inodes[2]
    assert len(shared) == 1
    for _, place in backend.checkpoints()[:2]:
        backend.delete(place)
    ((_, last),) = backend.checkpoints()
    assert content(last)["files/deep/frozen"] == files["deep/frozen"]
    assert verify_checkpoint(last).sound


def test_a_directory_may_change_once_it_is_saved(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {"a": b"1" * MIB})
    save(LocalWorkspace(LocalFiles(), tmp_path / "c"), source)
    with (source / "a").open("r+b") as file:
        file.write(b"2" * MIB)
    assert content(tmp_path / "c")["files/a"] == b"1" * MIB


def test_what_is_taken_over_is_durable_too(tmp_path: Path) -> None:
    """Whoever copied it there, with shutil say, has not waited for the disk."""
    synced: list[str] = []

    class Noting(LocalFiles):
        def sync(self, directory: Path, names: Sequence[str]) -> None:
            synced.extend(names)
            super().sync(directory, names)

    made_by_keepstep = save_directory(tmp_path / "one", {"w": torch.ones(3)})
    shutil.copytree(tmp_path / "one", tmp_path / "copied")
    save(LocalWorkspace(Noting(), tmp_path / "taken"), tmp_path / "copied")
    assert {*made_by_keepstep.manifest.files} <= {*synced}


def test_a_directory_holds_no_state_to_be_loaded(tmp_path: Path) -> None:
    save(LocalWorkspace(LocalFiles(), tmp_path / "c"), made(tmp_path / "source", {"a": b"1"}))
    checkpoint = Checkpoint.open(tmp_path / "c")
    for load in (checkpoint.load, lambda: checkpoint.load_into({})):
        with pytest.raises(UsageError, match=r"holds no state: it was made of a directory.*c/files"):
            load()


def test_a_mirror_holds_it_and_gives_it_back(source: Path, tmp_path: Path) -> None:
    files = LocalFiles()
    final = tmp_path / "store" / "checkpoint_0"
    manifest = save(LocalWorkspace(files, final), source)
    bucket = BucketBackend(Objects(MemoryStore(), "memory://mirror"))
    upload_checkpoint(bucket, final, final.name, manifest, lambda _: None)
    ((_, mirrored),) = bucket.checkpoints()
    assert verify_checkpoint(mirrored).sound
    pulled = pull_if_newer(bucket, LocalBackend(files, tmp_path / "other"), files)
    assert pulled is not None
    assert content(pulled) == content(final)
    assert (pulled / "files" / "empty" / "inner").is_dir()


def test_a_damaged_one_is_set_aside_whole(source: Path, tmp_path: Path) -> None:
    backend = LocalBackend(LocalFiles(), tmp_path / "store")
    final = backend.path / "checkpoint_000003"
    save(LocalWorkspace(LocalFiles(), final), source)
    with (final / "files" / "large").open("r+b") as file:
        file.seek(9 * MIB)
        file.write(b"?")
    report = verify_checkpoint(final)
    assert len(report.problems) == 1
    assert "files/large has the digest" in report.problems[0]
    aside = backend.set_aside(final)
    assert content(aside)["files/none"] == b""
    assert backend.next_number() == 4


# ------------------------------------------------------------------------------- whole checkpoints


def test_a_whole_checkpoint_is_taken_over_as_it_is(backend: Backend, tmp_path: Path) -> None:
    state = {"model": {"w": torch.arange(300_000)}, "n": 3}
    given = save_directory(
        tmp_path / "given", state, step=3, epoch=1, metrics={"loss": 1.0, "acc": 0.1}, tags=("t",),
        environment={"log": 5},
    )  # fmt: skip
    backend.claim()
    workspace = backend.reserve()
    manifest = save(workspace, given.path, step=9, metrics={"loss": 0.5}, more={"metadata": {"k": 1}})
    shutil.rmtree(given.path)
    assert (manifest.step, manifest.epoch, manifest.tags) == (9, 1, ("t",))
    assert manifest.metrics == {"loss": 0.5, "acc": 0.1}
    assert manifest.environment["log"] == 5
    assert manifest.environment["metadata"] == {"k": 1}
    assert manifest.id != given.manifest.id
    loaded = Checkpoint(workspace.final, manifest).load()
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    again = backend.reserve()
    if isinstance(workspace.final, Path):  # and one that was made of a directory
        save(again, workspace.final)
        assert content(again.final) == content(workspace.final)


def test_a_checkpoint_with_something_beside_it_is_a_directory_as_any_other(tmp_path: Path) -> None:
    given = save_directory(tmp_path / "given", {"n": 3}).path
    (given / "notes.txt").write_text("mine")
    save(LocalWorkspace(LocalFiles(), tmp_path / "c"), given)
    assert sorted(content(tmp_path / "c")) == ["files/manifest.json", "files/notes.txt", "files/state.json"]
    assert Checkpoint.open(tmp_path / "c" / "files").load() == {"n": 3}


def test_a_manifest_of_somebody_else_is_a_file_as_any_other(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {"manifest.json": b"{}"})
    save(LocalWorkspace(LocalFiles(), tmp_path / "c"), source)
    assert content(tmp_path / "c") == {"files/manifest.json": b"{}"}


# ----------------------------------------------------------------------------------------- refusals


def _link(source: Path) -> None:
    (source / "a").symlink_to("/etc/hostname")


def _link_to_directory(source: Path) -> None:
    (source / "a").symlink_to("/etc")


def _socket(source: Path) -> None:
    here = Path.cwd()
    os.chdir(source)
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("a")
    finally:
        os.chdir(here)


def _long(source: Path) -> None:
    made(source, {"/".join(["d" * 200] * 6) + "/a": b"1"})


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (_link, "a is a link.*Copy what it stands for into the directory, or leave it out"),
    "link to a directory": (_link_to_directory, "a is a link"),
    "socket": (_socket, "a is neither a file nor a directory"),
    "control character": (lambda source: made(source, {"a\x1b[31m": b"1"}), "control character.*Rename it"),
    "no UTF-8": (lambda source: made(source, {os.fsdecode(b"a\xff"): b"1"}), "not UTF-8.*Rename it"),
    "long": (_long, "it has 1[0-9]+ bytes; allowed: 1024"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_checkpoint_does_not_hold_is_named(tmp_path: Path, name: str) -> None:
    source = made(tmp_path / "source", {"first": b"1", "zuletzt": b"2"})
    make, message = REFUSED[name]
    make(source)
    with pytest.raises(DirectoryNotSavableError, match=message):
        save(LocalWorkspace(LocalFiles(), tmp_path / "c"), source)
    assert below(tmp_path) == ["source"]


def test_there_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, problem in (("gone", "does not exist"), ("file", "is no directory")):
        with pytest.raises(CheckpointNotFoundError, match=f"{name} {problem}"):
            save(LocalWorkspace(LocalFiles(), tmp_path / "c"), tmp_path / name)
    assert below(tmp_path) == ["file"]


class Meddling(LocalFiles):
    """Something else happens to the directory while it is read."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def create_segment(self, path: Path, size_bytes: int, *, durable: bool = True) -> SegmentFile:
        if path.name == "first":
            self.act()
        return super().create_segment(path, size_bytes, durable=durable)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "written to": (lambda s: (s / "first").open("r+b").write(b"x"), "first was written to or replaced"),
    "cut": (lambda s: os.truncate(s / "first", 5), "first was written to or replaced"),
    "extended": (lambda s: (s / "first").open("ab").write(b"x"), "first was written to or replaced"),
    "removed": (lambda s: (s / "first").unlink(), "first vanished"),
    "removed before it is read": (lambda s: (s / "second").unlink(), "second vanished"),
    "replaced": (
        lambda s: (made(s.parent, {"new": b""}) / "new").replace(s / "first"),
        "first was written",
    ),
    "all of it removed": (shutil.rmtree, "vanished while it was saved"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_while_it_is_read_is_not_committed(tmp_path: Path, name: str) -> None:
    files = {name: bytes(10 * MIB) for name in ("first", "other", "second", "third")}
    source = made(tmp_path / "source", files)
    for path in source.iterdir():
        os.utime(path, (1, 1))  # long ago: what is written now shows
    act, message = CHANGES[name]
    before = len(below(Path("/proc/self/fd")))
    with pytest.raises(DirectoryNotSavableError, match=f"{message}.*nothing was committed"):
        save(LocalWorkspace(Meddling(lambda: act(source)), tmp_path / "c"), source)
    assert below(tmp_path) == (["source"] if source.exists() else [])
    assert len(below(Path("/proc/self/fd"))) <= before + 1  # the one that the test itself left open


# -------------------------------------------------------------------- beside what is somebody else's


def test_files_of_others_stay_when_a_checkpoint_is_deleted_or_replaced(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {"a/mine": b"1", "b": b"2"})
    final = tmp_path / "store" / "checkpoint_0"
    for _ in range(2):
        save(LocalWorkspace(LocalFiles(), final), source)
        (final / "files" / "a" / "theirs").write_text("keep")
        (final / "files" / "link").unlink(missing_ok=True)
        (final / "files" / "link").symlink_to("b")
    shutil.rmtree(source)
    save(LocalWorkspace(LocalFiles(), final), made(source, {"c/new": b"3"}))
    assert (final / "files" / "a" / "theirs").read_text() == "keep"
    assert (final / "files" / "link").is_symlink()
    assert not (final / "files" / "a" / "mine").exists()
    assert verify_checkpoint(final).sound
    LocalBackend(LocalFiles(), final.parent).delete(final)
    assert sorted(str(p.relative_to(final)) for p in final.rglob("*")) == [
        "files", "files/a", "files/a/theirs", "files/link"
    ]  # fmt: skip
    with pytest.raises(DirectoryNotOursError, match="not empty and was not written by keepstep"):
        save(LocalWorkspace(LocalFiles(), final), source)


@pytest.mark.parametrize("where", ["files", "files/a"])
def test_a_directory_that_became_a_link_is_not_followed(tmp_path: Path, where: str) -> None:
    """Neither read nor deleted through."""
    final = tmp_path / "store" / "checkpoint_0"
    manifest = save(
        LocalWorkspace(LocalFiles(), final), made(tmp_path / "source", {"a/b": os.urandom(2 * MIB)})
    )
    outside = tmp_path / "outside"
    (final / where).rename(outside)
    (final / where).symlink_to(outside)
    report = verify_checkpoint(final)
    assert "behind a link" in report.problems[0]
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        source_of(final).open("files/a/b", manifest.files["files/a/b"])
    other = LocalWorkspace(LocalFiles(), final.with_name("checkpoint_1"))
    other.open()
    with pytest.raises(FileNotFoundError):
        other.link("files/a/b", "checkpoint_0", "files/a/b", manifest.files["files/a/b"])
    other.discard()
    LocalBackend(LocalFiles(), final.parent).delete(final)
    assert [p.name for p in outside.rglob("*") if p.is_file()] == ["b"]


# ------------------------------------------------------------------------------------------- kills


FILES = [{"a/b": bytes([n]) * 5000, "large": bytes([n]) * 300_000, "c": b"same"} for n in range(10)]


def _save(root: Path, number: int, files: Any) -> None:
    """As a trial does: under a name that it chose, and then the one before goes."""
    source = made(root.parent / "handed" / root.name, FILES[number])
    (source / "empty").mkdir(exist_ok=True)
    final = root / f"checkpoint_{number:06d}"
    description = describe(step=number, epoch=None, metrics=None, tags=(), pinned=False)
    workspace = LocalWorkspace(files, final)
    save_handed_over(workspace, source, description, Lineage(run="run"), copier=Copier(1))
    backend = LocalBackend(files, root)
    for number_there, place in backend.checkpoints():
        if number_there < number:
            backend.delete(place)


def _check(root: Path) -> None:
    store = Store(root)
    for checkpoint in store.list():
        report = checkpoint.verify()
        assert report.sound, report.problems
        step = checkpoint.step or 0
        assert content(checkpoint.path) == {f"files/{name}": data for name, data in FILES[step].items()}
        assert (checkpoint.path / "files" / "empty").is_dir()
    assert {checkpoint.step for checkpoint in store.list()} & {1, 2}
    store.claim()
    _save(root, 3, LocalFiles())
    assert [checkpoint.name for checkpoint in Store(root).list()] == ["checkpoint_000003"]
    assert leftovers(root) == []


SCENARIO = Scenario(
    lambda root: _save(root, 1, LocalFiles()), lambda root, files: _save(root, 2, files), _check
)


@pytest.mark.parametrize("power_cut", [False, True])
def test_killed_at_each_operation_the_older_or_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power_cut: bool
) -> None:
    assert kill_at_each_operation(tmp_path, monkeypatch, SCENARIO, power_cut=power_cut) > 20


def test_a_disk_that_refuses_leaves_the_older_one_whole(tmp_path: Path) -> None:
    assert fail_at_each_operation(tmp_path, SCENARIO, NO_SPACE) > 20


def open_below(directory: Path) -> list[str]:
    """What this process has open there; other tests may have left threads that open files elsewhere."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(fd.readlink()))
    return [path for path in found if path.startswith(f"{directory}/")]


def test_threads_that_fail_leave_nothing_open(tmp_path: Path) -> None:
    source = made(tmp_path / "source", {f"{n}": bytes(20 * MIB) for n in range(3)})
    refused: set[str] = set()
    again = [*range(3, 20)] * 5  # which thread comes first differs: so does what is refused
    for number, at in enumerate(again):
        if number >= 17 and {"create_segment", "write_at", "finish"} <= refused:
            break
        files = FaultyFiles(at=at, error=NO_SPACE)
        with pytest.raises(StoreError):
            save(LocalWorkspace(files, tmp_path / "c"), source)
        assert open_below(tmp_path) == [], files.log[at]
        assert below(tmp_path) == ["source"]
        refused.add(files.log[at].partition(" ")[0])
    assert {"create_segment", "write_at", "finish"} <= refused
