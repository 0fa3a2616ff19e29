"""What a mirror finds and can't do is told: to whoever saves, and to whoever waits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest
from tests.buckets.test_mirror import mirrored, names, uploads
from tests.buckets.test_mirror_faults import flip, saved_and_mirrored, until
from tests.buckets.test_mirror_goes_on import until_mirrored
from tests.buckets.test_store import raw, state
from tests.checkpoint.faults import NO_SPACE, FaultyFiles
from tests.checkpoint.test_refused import shut

from keepstep import Retention, Store
from keepstep.checkpoint.place.objects import Objects
from keepstep.checkpoint.uploads import link_upload
from keepstep.errors import BucketError, MirrorError
from keepstep.files import LocalFiles

__all__ = ["mirrored"]

Open = Callable[..., Store]
BASE = "base.safetensors"


def inodes(store: Store) -> list[int]:
    return [(checkpoint.path / BASE).stat().st_ino for checkpoint in store.list()]


class Away:
    """A network that is away for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = False
        create = Objects.create

        def sometimes(objects: Objects, key: str, data: bytes) -> bool:
            if self.is_away:
                raise BucketError("the network is away")
            return create(objects, key, data)

        monkeypatch.setattr(Objects, "create", sometimes)

    def fail(self, store: Store) -> None:
        """Have the upload of one more checkpoint fail."""
        self.is_away = True
        fail(store)
        self.is_away = False


def fail(store: Store) -> None:
    """Save one more checkpoint and let its upload fail, without asking for the error."""
    assert store.mirror is not None
    before = store.mirror.progress.failed
    store.save(state(store.next_number))
    assert until(lambda: store.mirror is not None and store.mirror.progress.failed > before)


# ------------------------------------------------------------------------------------------- damage


def test_what_an_upload_finds_damaged_is_written_anew_by_the_next_save(
    mirrored: Open, bucket_store: Open
) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    flip(store.path / "checkpoint_0" / BASE)
    store.save(state(1))
    assert store.mirror is not None
    with pytest.raises(MirrorError, match="digest differs") as caught:
        store.mirror.wait()
    assert "is safe" not in str(caught.value)
    assert "tried again after" not in str(caught.value)
    assert f"keepstep verify {store.path}" in str(caught.value)
    saved_and_mirrored(store, 2)
    first, linked, anew, again = inodes(store)
    assert first == linked != anew == again
    assert [report.sound for report in store.verify()] == [False, False, True, True]
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_2", "checkpoint_3"]


def test_damage_in_the_mirror_is_none_of_what_is_here(mirrored: Open, bucket_store: Open) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    obstore.put(raw(bucket_store()), "checkpoint_1/manifest.json", b"{}")
    store.save(state(1))
    assert store.mirror is not None
    with pytest.raises(MirrorError, match=r"s3://.*checkpoint_1: manifest\.json.* is safe in") as caught:
        store.mirror.wait()
    assert "is tried again" not in str(caught.value)
    saved_and_mirrored(store, 1)
    assert len(set(inodes(store))) == 1


def test_a_name_that_another_run_has_is_not_said_to_be_tried_again(
    mirrored: Open, bucket_store: Open
) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    obstore.put(raw(bucket_store()), "checkpoint_1/claim.json", b"{}")
    store.save(state(1))
    assert store.mirror is not None
    with pytest.raises(MirrorError, match=r"belongs to another checkpoint.* is safe in") as caught:
        store.mirror.wait()
    assert "is tried again" not in str(caught.value)


def test_damage_is_told_though_the_network_failed_after_it_and_the_network_is_not_once_it_was_made_good(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Away(monkeypatch)
    store = saved_and_mirrored(mirrored(), 1)
    flip(store.path / "checkpoint_0" / BASE)
    fail(store)
    network.fail(store)
    store.save(state(3))
    with pytest.raises(MirrorError, match="digest differs"):
        store.close()
    network.fail(store)
    store.save(state(5))
    store.close()
    assert names(bucket_store()) == [f"checkpoint_{number}" for number in (0, 2, 3, 4, 5)]


# ------------------------------------------------------------------------------ what is not linked


class FullDisk(LocalFiles):
    """While it is full, what would be linked for the mirror is copied, and the copy is cut off."""

    is_full = False

    def link(self, source: Path, target: Path) -> None:
        if self.is_full and "uploads" in target.parts and source.name == "model.safetensors":
            target.write_bytes(source.read_bytes()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        super().link(source, target)


def test_what_could_not_be_linked_for_the_mirror_is_told_and_made_good(
    mirrored: Open, bucket_store: Open
) -> None:
    disk = FullDisk()
    store = saved_and_mirrored(mirrored(files=disk, mirror_pending=9), 1)
    disk.is_full = True
    for _ in range(2):
        store.save(state(1))
        with pytest.raises(MirrorError, match=r"No space left on device.* tried again after the next save"):
            store.close()
    assert uploads(store) == []
    disk.is_full = False
    saved_and_mirrored(store, 1)
    store.close()
    assert names(bucket_store()) == [f"checkpoint_{number}" for number in range(4)]
    assert uploads(store) == []


def test_a_link_that_was_cut_off_anywhere_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    checkpoint = store.save(state(0))
    inner = checkpoint.path / "model.safetensors"
    place, at = tmp_path / "uploads", 0
    while True:
        files = FaultyFiles(at=at, error=NO_SPACE)
        try:
            linked = link_upload(files, place, checkpoint.path, checkpoint.manifest)
        except OSError:
            assert not place.exists() or not list(place.iterdir()), files.log[-1]
            at += 1
            continue
        break
    assert at > 4
    assert (linked / inner.name).samefile(inner)


def test_a_deleted_checkpoint_leaves_no_names_behind(tmp_path: Path) -> None:
    """They would hold its blocks."""
    store = Store(tmp_path / "run")
    checkpoint = store.save(state(0))
    (checkpoint.path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        link_upload(LocalFiles(), tmp_path / "uploads", checkpoint.path, checkpoint.manifest)
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize("lies", ["linked already", "in the store"])
def test_what_can_not_be_read_for_now_is_told_and_goes_with_a_later_one(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch, lies: str
) -> None:
    alone = Store(mirrored().path)
    left = alone.save(state(0))
    alone.save(state(1))
    place = left.path
    if lies == "linked already":
        place = alone.path / ".keepstep" / "uploads" / f"{left.name}.{left.manifest.id}"
        shutil.copytree(left.path, place)
        shutil.rmtree(left.path)
    store = mirrored(mirror_pending=9)
    with monkeypatch.context() as patched:
        shut(place, patched)
        store.claim()
        assert store.mirror is not None
        for _ in range(2):
            with pytest.raises(MirrorError, match=r"Permission denied.* tried again after the next save"):
                store.mirror.wait()
            store.save(state(2))
            assert until(lambda: names(bucket_store())[-1] == store.list()[-1].name)
    saved_and_mirrored(store, 1)
    store.close()
    assert names(bucket_store()) == [f"checkpoint_{number}" for number in range(5)]


def test_what_can_not_be_read_brings_back_nothing_that_was_passed_over(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Store(mirrored().path)
    for number in range(6):
        alone.save(state(number))
    obstore.put(raw(bucket_store()), "checkpoint_5/claim.json", b"{}")
    store = mirrored(mirror_pending=2)
    shut(alone.path / "checkpoint_0", monkeypatch)
    assert store.mirror is not None
    for _ in range(3):
        store.save(state(9))
        with pytest.raises(MirrorError):
            store.mirror.wait()
        assert names(bucket_store())[-1] == store.list()[-1].name
    assert caplog.text.count("newer ones overtook it") == store.mirror.progress.skipped <= 5
    assert caplog.text.count("checkpoint_5 was not mirrored to") <= 1
    assert not uploads(store)


# ---------------------------------------------------------------------------------------- the rules


def test_a_damaged_newest_keeps_no_sound_one_from_the_mirror_when_the_rules_want_one(
    mirrored: Open, bucket_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    keeps = {"mirror_retention": Retention(keep_last=1)}
    saved_and_mirrored(mirrored(**keeps), 1).close()
    alone = Store(mirrored().path)
    alone.load_latest_into(state(9))
    for number in (1, 2):
        alone.save(state(number))
    (alone.path / "checkpoint_2" / "model.safetensors").unlink()
    until_mirrored(mirrored(**keeps)).close()
    assert names(bucket_store()) == ["checkpoint_1"]
    assert caplog.text.count("is not mirrored: ") == 1
