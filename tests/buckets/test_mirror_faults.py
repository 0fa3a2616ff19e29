"""What a mirror may never do: destroy, delete what another run has, hang, or keep back what it has."""

from __future__ import annotations

import gc
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from tests.buckets.server import Server
from tests.buckets.test_mirror import mirrored, names, uploads
from tests.buckets.test_store import raw, state
from tests.holding import at_call

from keepstep import Retention, Store
from keepstep.checkpoint import mirror as mirror_module
from keepstep.checkpoint.keeping import catalog
from keepstep.errors import BucketError, MirrorError, NoValidCheckpointError, StoreError
from keepstep.files import LocalFiles

__all__ = ["mirrored"]

Open = Callable[..., Store]


def saved_and_mirrored(store: Store, count: int, **more: Any) -> Store:
    for _ in range(count):
        store.save(state(store.next_number), **more)
        assert store.mirror is not None
        store.mirror.wait()
    return store


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


# ------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("spoil", [cut, flip])
def test_damage_of_the_newest_is_repaired_from_the_mirror_and_the_damaged_one_is_kept(
    mirrored: Open, spoil: Callable[[Path], None]
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    store.close()
    spoil(store.path / "checkpoint_1" / "model.safetensors")
    spoilt = (store.path / "checkpoint_1" / "model.safetensors").read_bytes()
    live = state(9)
    found = mirrored().load_latest_into(live)
    assert found is not None
    assert (found.name, live["progress"]["seed"]) == ("checkpoint_1", 1)
    assert torch.equal(live["model"]["weight"], state(1)["model"]["weight"])
    damaged = store.path / ".keepstep" / "damaged" / "checkpoint_1"
    assert (damaged / "model.safetensors").read_bytes() == spoilt
    assert names(store) == ["checkpoint_0", "checkpoint_1"]
    assert found.verify().sound


def test_a_disk_that_spoils_every_copy_ends_the_repair(
    mirrored: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    flip(store.path / "checkpoint_1" / "model.safetensors")
    anew = mirrored()
    pull = anew._newest.pull

    def pull_and_spoil() -> Path | None:
        pulled = pull()
        if pulled is not None:
            flip(pulled / "model.safetensors")
        return pulled

    monkeypatch.setattr(anew._newest, "pull", pull_and_spoil)
    found = anew.load_latest_into(state(9))
    assert found is not None
    assert found.name == "checkpoint_0"


def test_nothing_here_and_only_damage_in_the_mirror_is_no_fresh_start(
    mirrored: Open, bucket_store: Open
) -> None:
    saved_and_mirrored(mirrored(), 1)
    obstore.put(raw(bucket_store()), "checkpoint_0/state.json", b"{}")
    with pytest.raises(NoValidCheckpointError, match=r"checkpoint_0: .*state\.json"):
        mirrored("elsewhere").load_latest_into(state(0))


def test_what_is_newer_and_can_not_be_brought_is_an_error_and_nothing_older_is_taken(
    mirrored: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    shutil.copytree(store.path, store.path.with_name("old"))
    saved_and_mirrored(store, 1)
    old = mirrored("old")

    def lost(*_: object) -> int:
        raise BucketError("the network is gone")

    assert old.mirror is not None
    monkeypatch.setattr(old.mirror.bucket._objects, "read_into", lost)
    with pytest.raises(StoreError, match=r"checkpoint_1 is newer .*network is gone"):
        old.load_latest_into(state(9))
    assert names(old) == ["checkpoint_0"]


# -------------------------------------------------------------------------------------- other runs


def test_what_another_run_put_into_the_mirror_is_neither_taken_nor_deleted(
    mirrored: Open, bucket_store: Open
) -> None:
    saved_and_mirrored(mirrored(), 3)
    other = mirrored("other", retention=Retention(keep_last=1))
    saved_and_mirrored(other, 3)
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1", "checkpoint_2", "checkpoint_5"]
    alone = Store(other.path.with_name("alone"))
    alone.save(state(0))
    late = mirrored("alone")
    with pytest.raises(StoreError, match="of another run"):
        late.latest()
    assert names(alone) == ["checkpoint_0"]


def test_numbers_that_the_mirror_has_are_left_and_the_next_ones_are_mirrored(
    mirrored: Open, bucket_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    first = saved_and_mirrored(mirrored(), 2)
    ids = [checkpoint.manifest.id for checkpoint in bucket_store().list()]
    without = Store(first.path.with_name("other"))
    without.save(state(7))
    without.save(state(8))
    del without
    store = mirrored("other")
    for _ in range(2):
        store.save(state(9))
        assert store.mirror is not None
        store.mirror.wait()
    assert uploads(store) == []
    assert caplog.text.count("these are not mirrored") == 1
    assert [checkpoint.manifest.id for checkpoint in bucket_store().list()[:2]] == ids
    assert names(bucket_store())[2:] == names(store)[2:] == ["checkpoint_2", "checkpoint_3"]


def test_what_the_mirror_would_drop_again_is_not_uploaded_again(mirrored: Open, bucket_store: Open) -> None:
    keeps = {"mirror_retention": Retention(keep_last=1), "mirror_pending": 9}
    store = saved_and_mirrored(mirrored(**keeps), 3)
    store.close()
    again = mirrored(**keeps)
    again.claim()
    assert again.mirror is not None
    again.mirror.wait()
    assert again.mirror.progress.mirrored == 0
    assert names(bucket_store()) == ["checkpoint_2"]


# ------------------------------------------------------------------------------- threads and the end


def test_whatever_an_upload_raises_nobody_waits_for_ever(
    mirrored: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("nobody thought of it")

    monkeypatch.setattr(mirror_module, "upload_checkpoint", broken)
    store = mirrored()
    store.save(state(0))
    assert store.mirror is not None
    with pytest.raises(MirrorError, match="nobody thought of it"):
        store.mirror.wait()


def test_a_thread_that_ends_leaves_nobody_waiting(mirrored: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("nobody thought of it")

    monkeypatch.setattr(catalog, "_entry", broken)
    monkeypatch.setattr(mirror_module.catalog, "scan", broken)
    store = mirrored()
    store.claim()
    assert store.mirror is not None
    with pytest.raises(MirrorError, match="nobody thought of it"):
        store.mirror.wait()


def test_what_was_under_way_when_the_thread_ended_is_taken_up_again(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("nobody thought of it")

    store = saved_and_mirrored(mirrored(), 1)
    with monkeypatch.context() as patched:
        patched.setattr(mirror_module.Mirror, "_try", broken)
        store.save(state(1))
        assert store.mirror is not None
        with pytest.raises(MirrorError, match=r"nobody thought of it.* tried again after the next save"):
            store.mirror.wait()
    saved_and_mirrored(store, 1)
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]


def mirror_threads() -> int:
    return sum(thread.name == "keepstep-mirror" for thread in threading.enumerate())


def until(seen: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + limit_s
    while not seen() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return seen()


def test_the_thread_ends_with_its_store_and_comes_back_for_the_next_save(
    mirrored: Open, bucket_store: Open
) -> None:
    gc.collect()
    assert until(lambda: mirror_threads() == 0)
    store = saved_and_mirrored(mirrored(), 1)
    assert mirror_threads() == 1
    store.close()
    assert until(lambda: mirror_threads() == 0)
    saved_and_mirrored(store, 1)
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1"]
    del store
    gc.collect()
    assert until(lambda: mirror_threads() == 0)


def test_what_is_being_linked_is_not_taken_for_the_rest_of_a_dead_process(
    mirrored: Open, bucket_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[Store] = []

    class CaughtUpMeanwhile(LocalFiles):
        def link(self, source: Path, target: Path) -> None:
            super().link(source, target)
            if "uploads" in target.parts and target.name != "manifest.json" and opened:
                mirror = opened.pop().mirror
                assert mirror is not None
                other = threading.Thread(target=mirror._catch_up)
                other.start()
                other.join(0.5)

    store = mirrored(files=CaughtUpMeanwhile())
    store.claim()
    assert store.mirror is not None
    store.mirror.wait()
    opened.append(store)
    store.save(state(0))
    store.mirror.wait()
    assert not opened
    assert "could not be linked for the mirror" not in caplog.text
    assert "could not be brought up to date" not in caplog.text
    assert names(bucket_store()) == ["checkpoint_0"]


def test_a_process_that_forked_after_it_used_a_bucket_is_told_so_in_the_child(
    server: Server, tmp_path: Path, address: str
) -> None:
    code = f"""
import os, sys, torch
from keepstep import Store
from keepstep.errors import BucketError
store = Store({str(tmp_path / "run")!r}, mirror={address!r})
store.save({{"x": torch.ones(3_000_000)}})
pid = os.fork()
if not pid:
    try:
        Store({address!r}).list()
    except BucketError as error:
        print(error, flush=True)
    sys.exit(0)
_, status = os.waitpid(pid, 0)
print("ended", status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=server.environment(),
        timeout=40,
    )
    assert "forked" in done.stdout, done.stderr
    assert "ended 0" in done.stdout, done.stderr


def test_the_end_of_the_process_tries_no_more_after_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"endpoint": "http://127.0.0.1:9", "access_key_id": "a", "secret_access_key": "b"}
    limits = {"max_retries": 0, "retry_timeout_s": 1, "connect_timeout_s": 1}
    store = Store(tmp_path, mirror="s3://tests/none", storage_options={**options, **limits}, mirror_pending=9)
    tried: list[str] = []
    may_go = threading.Event()

    def unreachable(_: object, __: object, name: str, *___: object) -> None:
        tried.append(name)
        may_go.wait(20)
        raise BucketError("no answer")

    monkeypatch.setattr(mirror_module, "upload_checkpoint", unreachable)
    for number in range(5):
        store.save(state(number))
    assert store.mirror is not None
    assert until(lambda: len(tried) == 1)
    at_call(monkeypatch, mirror_module.Mirror, "wait", may_go.set)  # by then the end is known
    with caplog.at_level(logging.CRITICAL):
        store.mirror.drain()
    assert len(tried) == 1
    assert "no answer" in caplog.text


def test_what_the_end_waits_for_is_counted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"endpoint": "http://127.0.0.1:9", "access_key_id": "a", "secret_access_key": "b"}
    limits = {"max_retries": 0, "retry_timeout_s": 1, "connect_timeout_s": 1}
    looked = threading.Event()
    monkeypatch.setattr(mirror_module.Mirror, "_catch_up", lambda _: looked.wait(20))
    store = Store(tmp_path, mirror="s3://tests/none", storage_options={**options, **limits})
    store.save(state(0))
    at_call(monkeypatch, mirror_module.Mirror, "wait", looked.set)  # by then it has counted
    assert store.mirror is not None
    store.mirror.drain()
    assert "waiting for the upload of 1 checkpoint(s)" in caplog.text
