"""What every place for checkpoints does, whatever it is made of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from keepstep.checkpoint.format.manifest import (
    STATE_NAME,
    FileEntry,
    Manifest,
    digest_of,
    dump_manifest,
)
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, source_of
from keepstep.checkpoint.place.backend import Backend, Workspace
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.bucket_reading import as_key, as_name
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import FileSizeError, MissingFileError, StoreBusyError, StoreError
from keepstep.files import LocalFiles

MIB = 1 << 20
Open = Callable[[], Backend]


@pytest.fixture(params=["directory", "bucket"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same place again and again."""
    if request.param == "directory":
        return lambda: LocalBackend(LocalFiles(), tmp_path)
    store = MemoryStore()
    return lambda: BucketBackend(Objects(store, "memory://run"))


def entry(data: bytes, within: str | None = None) -> FileEntry:
    return FileEntry(bytes=len(data), digest=digest_of(data), within=within)


def manifest_of(files: dict[str, FileEntry], name: str = "x") -> bytes:
    manifest = Manifest(
        id=name,
        created_at="2026-01-01T00:00:00+00:00",
        step=1,
        epoch=None,
        metrics={},
        tags=(),
        pinned=False,
        parent=None,
        run="run",
        attempt=1,
        environment={},
        files=files,
    )
    return dump_manifest(manifest)


def write(workspace: Workspace, files: dict[str, bytes]) -> dict[str, FileEntry]:
    workspace.open()
    for name, data in files.items():
        workspace.write_file(name, data)
    return {name: entry(data) for name, data in files.items()}


def committed(backend: Backend, files: dict[str, bytes]) -> Place:
    backend.claim()
    workspace = backend.reserve()
    workspace.commit(manifest_of(write(workspace, {STATE_NAME: b"{}", **files}), f"{workspace.final}"))
    backend.release(workspace)
    return workspace.final


def content(place: Place, name: str) -> bytes:
    said = read_manifest(place).files[name]
    file = source_of(place).open(name, said)
    try:
        return file.read(0, said.bytes)
    finally:
        file.close()


def names(backend: Backend) -> list[str]:
    return [source_of(place).name for _, place in backend.checkpoints()]


def test_a_checkpoint_is_there_once_it_is_committed(opened: Open) -> None:
    backend = opened()
    backend.claim()
    workspace = backend.reserve()
    files = write(workspace, {STATE_NAME: b"{}", "a.txt": b"hello"})
    assert names(opened()) == []
    workspace.commit(manifest_of(files))
    backend.release(workspace)
    assert names(opened()) == ["checkpoint_0"]
    place = opened().checkpoints()[0][1]
    assert content(place, "a.txt") == b"hello"
    assert source_of(place).exists()
    source_of(place).check_files(files)


def test_what_was_discarded_is_not_there(opened: Open) -> None:
    backend = opened()
    backend.claim()
    workspace = backend.reserve()
    write(workspace, {"a.txt": b"hello"})
    workspace.discard()
    backend.release(workspace)
    assert names(opened()) == []
    committed(backend, {})
    assert len(names(opened())) == 1


def test_others_add_to_what_one_has_begun(opened: Open) -> None:
    backend, other = opened(), opened()
    base = {"base.bin": b"unchanged"}
    first = source_of(committed(backend, base)).name
    for ending in ("commit", "discard"):
        host, guest = backend.reserve(), other.guest()
        guest.discard()  # nothing is known yet, and nothing to be removed
        files = write(host, {STATE_NAME: b"{}"})
        guest.accept(host.invitation())
        with guest.explained():
            files |= write(guest, {"theirs.bin": b"added"})
        within = guest.link("base.bin", first, "base.bin", entry(base["base.bin"]))
        files["base.bin"] = entry(base["base.bin"], within)
        host.take_over(files)
        if ending == "commit":
            host.commit(manifest_of(files))
            guest.leave()
            guest.discard()  # too late
            assert names(opened()) == ["checkpoint_0", "checkpoint_1"]
            place = opened().checkpoints()[1][1]
            assert content(place, "theirs.bin") == b"added"
            assert content(place, "base.bin") == b"unchanged"
        else:
            guest.discard()
            host.discard()
            assert names(opened()) == ["checkpoint_0", "checkpoint_1"]
        backend.release(host)


def test_what_a_guest_gave_up_can_not_be_committed() -> None:
    """In a bucket the guest removes its objects, so that a manifest would name what is gone."""
    store = MemoryStore()
    backend, other = (BucketBackend(Objects(store, "memory://run")) for _ in range(2))
    backend.claim()
    host, guest = backend.reserve(), other.guest()
    files = write(host, {STATE_NAME: b"{}"})
    guest.accept(host.invitation())
    files |= write(guest, {"theirs.bin": b"added"})
    guest.discard()
    with pytest.raises(StoreBusyError, match="another rank gave this save up"):
        host.commit(manifest_of(files))
    host.discard()
    assert names(backend) == []
    assert {found.key for found in backend._objects.list("checkpoint_0")} == {
        "checkpoint_0/claim.json", "checkpoint_0/manifest.json",
    }  # fmt: skip


def test_what_others_linked_stays_and_what_is_gone_is_not_committed() -> None:
    store = MemoryStore()
    backend, other = (BucketBackend(Objects(store, "memory://run")) for _ in range(2))
    first = committed(backend, {"base.bin": b"unchanged"})
    host, guest = backend.reserve(), other.guest()
    host.open()
    guest.accept(host.invitation())
    linked = entry(b"unchanged", guest.link("base.bin", "checkpoint_0", "base.bin", entry(b"unchanged")))
    host.take_over({"base.bin": linked})
    backend.delete(first)  # by another thread of rank 0: the object stays
    host.commit(manifest_of({**write(host, {STATE_NAME: b"{}"}), "base.bin": linked}))
    guest.leave()
    assert content(host.final, "base.bin") == b"unchanged"
    late = backend.reserve()
    backend.delete(host.final)
    with pytest.raises(FileNotFoundError):
        late.take_over({"base.bin": linked})


def test_who_is_sent_to_another_place_says_so(opened: Open) -> None:
    backend = opened()
    backend.claim()
    host = backend.reserve()
    host.open()
    invitation = host.invitation()
    elsewhere: Backend = BucketBackend(Objects(MemoryStore(), "memory://other"))
    if isinstance(backend, LocalBackend):
        elsewhere = backend
        host.discard()
    guest = elsewhere.guest()
    guest.accept(invitation)
    with pytest.raises(StoreError, match="all ranks"), guest.explained():
        guest.open()


def test_numbers_rise_and_are_given_once(opened: Open) -> None:
    backend = opened()
    backend.claim()
    first, second = backend.reserve(), backend.reserve()
    assert source_of(first.final).name != source_of(second.final).name
    for workspace in (second, first):
        workspace.commit(manifest_of(write(workspace, {STATE_NAME: b"{}"})))
        backend.release(workspace)
    assert names(opened()) == ["checkpoint_0", "checkpoint_1"]
    assert opened().next_number() == 2


@pytest.mark.parametrize("size", [5, 4096, 8 * MIB, 8 * MIB + 1, 21 * MIB + 77])
def test_segments_are_filled_by_several_threads(opened: Open, size: int) -> None:
    backend = opened()
    backend.claim()
    workspace = backend.reserve()
    workspace.open()
    segment = workspace.create_segment("a.bin", size)
    data = bytes(range(251)) * (size // 251 + 1)
    starts = iter(range(0, size, 8 * MIB))
    lock = threading.Lock()

    def fill() -> None:
        memory = bytearray(8 * MIB)  # one block, used again as soon as it is written
        while True:
            with lock:
                begin = next(starts, None)
            if begin is None:
                return
            end = min(begin + 8 * MIB, size)
            memory[: end - begin] = data[begin:end]
            segment.write_at(memoryview(memory)[: -(-(end - begin) // 4096) * 4096], begin)

    threads = [threading.Thread(target=fill) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    segment.finish()
    files = write(workspace, {STATE_NAME: b"{}"}) | {"a.bin": entry(data[:size])}
    workspace.commit(manifest_of(files))
    backend.release(workspace)
    place = opened().checkpoints()[0][1]
    source_of(place).check_files(files)
    assert content(place, "a.bin") == data[:size]


def test_names_that_users_give_are_kept_apart(opened: Open) -> None:
    """Of a bucket, too, that escapes what is not plain; `=` is what it is escaped with."""
    files = {
        f"files/{name}": name.encode() for name in ("a=20b", "a b", "a%20b", "=", "\u00fc", "a/=3D", "~")
    }
    place = committed(opened(), files)
    assert {name: content(place, name) for name in files} == files
    assert all(as_name(as_key(name)) == name for name in files)
    opened().delete(place)
    assert names(opened()) == []


def test_a_segment_can_be_left_half_written(opened: Open) -> None:
    backend = opened()
    backend.claim()
    workspace = backend.reserve()
    workspace.open()
    segment = workspace.create_segment("a.bin", 20 * MIB)
    writer = threading.Thread(target=lambda: segment.write_at(memoryview(bytearray(8 * MIB)), 0))
    writer.start()
    writer.join()
    segment.abandon()
    workspace.discard()
    assert names(opened()) == []


def test_a_writer_that_waits_for_the_part_before_its_own_can_be_stopped(opened: Open) -> None:
    backend = opened()
    backend.claim()
    workspace = backend.reserve()
    workspace.open()
    segment = workspace.create_segment("a.bin", 20 * MIB)

    def write_the_second() -> None:
        with contextlib.suppress(Exception):  # the first never comes
            segment.write_at(memoryview(bytearray(8 * MIB)), 8 * MIB)

    writer = threading.Thread(target=write_the_second)
    writer.start()
    segment.stop()
    writer.join(10)
    assert not writer.is_alive()
    segment.abandon()
    workspace.discard()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_linked_files_outlive_their_first_checkpoint(opened: Open, order: tuple[int, ...]) -> None:
    backend = opened()
    frozen = b"frozen weights" * 100
    places = [committed(backend, {"base.bin": frozen, "head.bin": b"0"})]
    for number in (1, 2):
        workspace = backend.reserve()
        files = write(workspace, {STATE_NAME: b"{}", "head.bin": b"%d" % number})
        within = workspace.link("base.bin", source_of(places[-1]).name, "base.bin", entry(frozen))
        workspace.commit(manifest_of(files | {"base.bin": entry(frozen, within)}, f"c{number}"))
        backend.release(workspace)
        places.append(workspace.final)
    left = list(places)
    for index in order:
        backend.delete(places[index])
        left.remove(places[index])
        for place in left:
            assert content(place, "base.bin") == frozen
            source_of(place).check_files(read_manifest(place).files)
    assert names(opened()) == []


def test_only_what_is_there_can_be_linked(opened: Open) -> None:
    backend = opened()
    first = committed(backend, {"base.bin": b"12345"})
    workspace = backend.reserve()
    workspace.open()
    for checkpoint, file, data in [
        ("checkpoint_0", "base.bin", b"longer"),
        ("checkpoint_0", "base.bin", b"other"),
        ("checkpoint_0", "other.bin", b"12345"),
        ("checkpoint_7", "base.bin", b"12345"),
    ]:
        with pytest.raises(FileNotFoundError):
            workspace.link(file, checkpoint, file, entry(data))
    backend.delete(first)
    with pytest.raises(FileNotFoundError):
        workspace.link("base.bin", "checkpoint_0", "base.bin", entry(b"12345"))
    workspace.discard()


def test_deleting_twice_says_so(opened: Open) -> None:
    backend = opened()
    place = committed(backend, {"a": b"1"})
    backend.delete(place)
    with pytest.raises(StoreError) as caught:
        backend.delete(place)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    assert not source_of(place).exists()


def test_what_is_set_aside_is_kept_and_its_number_never_used_again(opened: Open) -> None:
    backend = opened()
    committed(backend, {"a": b"1"})
    place = committed(backend, {"a": b"2"})
    target = backend.set_aside(place)
    assert names(opened()) == ["checkpoint_0"]
    assert [source_of(p).name for _, p in opened().set_aside_before()] == ["checkpoint_1"]
    assert read_manifest(target).files["a"].bytes == 1
    again = opened()
    again.claim()
    assert again.next_number() == 2
    committed(again, {"a": b"3"})
    assert names(opened()) == ["checkpoint_0", "checkpoint_2"]


def test_a_place_knows_its_own(opened: Open, tmp_path: Path) -> None:
    backend = opened()
    place = committed(backend, {})
    assert backend.holds(place)
    assert not backend.holds(tmp_path / "elsewhere" / "checkpoint_0")


def test_damage_is_reported_by_file(opened: Open) -> None:
    backend = opened()
    place = committed(backend, {"a": b"1"})
    with pytest.raises(FileSizeError, match="a has 1 bytes, but 2 were committed"):
        source_of(place).check_files({"a": entry(b"12")})
    with pytest.raises(MissingFileError, match="b "):
        source_of(place).check_files({"b": entry(b"12")})
