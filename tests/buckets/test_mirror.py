"""A directory with a mirror in a bucket: committed here, copied behind, pulled where nothing is as new."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from tests.buckets.server import Server
from tests.buckets.test_store import keys, state

from keepstep import Retention, Store
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import BucketError, MirrorError

Open = Callable[..., Store]


@pytest.fixture
def mirrored(server: Server, address: str, tmp_path: Path) -> Open:
    """Opens stores with one mirror, in a directory below `tmp_path`."""

    def open_store(name: str = "run", **more: Any) -> Store:
        return Store(tmp_path / name, mirror=address, storage_options=server.options(), **more)

    return open_store


def names(store: Store) -> list[str]:
    return [checkpoint.name for checkpoint in store.list()]


def uploads(store: Store) -> list[str]:
    place = store.path / ".keepstep" / "uploads"
    return sorted(entry.name for entry in place.iterdir()) if place.exists() else []


def test_what_is_committed_is_copied_and_a_fresh_machine_pulls_it(mirrored: Open, bucket_store: Open) -> None:
    store = mirrored()
    for number in range(3):
        store.save(state(number), step=number)
        assert store.mirror is not None
        store.mirror.wait()
    copies = bucket_store()
    assert names(copies) == ["checkpoint_0", "checkpoint_1", "checkpoint_2"]
    assert all(report.sound for report in copies.verify())
    assert [c.manifest.id for c in copies.list()] == [c.manifest.id for c in store.list()]
    assert copies.list()[-1].manifest.files["base.safetensors"].within == "checkpoint_0"
    assert "checkpoint_1/base.safetensors" not in keys(copies)
    assert uploads(store) == []
    progress = store.mirror.progress
    assert (progress.mirrored, progress.pending, progress.uploading) == (3, 0, None)
    assert progress.bytes_done == progress.bytes_total == store.list()[-1].bytes

    fresh = mirrored("elsewhere")
    live = state(9)
    found = fresh.load_latest_into(live)
    assert found is not None
    assert (found.name, live["progress"]["seed"]) == ("checkpoint_2", 2)
    assert found.path == fresh.path / "checkpoint_2"
    assert found.manifest.files["base.safetensors"].within is None
    assert found.verify().sound


def test_an_older_directory_is_brought_up_to_date_and_numbers_go_on(mirrored: Open) -> None:
    first = mirrored()
    first.save(state(0))
    assert first.mirror is not None
    first.mirror.wait()
    old = mirrored("old")
    assert old.latest() is not None
    first.save(state(1))
    first.mirror.wait()
    newest = old.latest()
    assert newest is not None
    assert newest.name == "checkpoint_1"
    anew = mirrored("anew")
    assert anew.save(state(2)).name == "checkpoint_2", "a run that starts anew takes no number of the mirror"


def test_damage_in_the_mirror_is_passed_over(
    mirrored: Open, bucket_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    store = mirrored()
    for number in range(2):
        store.save(state(number))
        assert store.mirror is not None
        store.mirror.wait()
    copies = bucket_store()
    raw = copies._backend._objects._store  # type: ignore[attr-defined]
    data = bytearray(obstore.get(raw, "checkpoint_1/model.safetensors").bytes())
    data[-1] ^= 1
    obstore.put(raw, "checkpoint_1/model.safetensors", bytes(data))
    fresh = mirrored("elsewhere")
    found = fresh.latest()
    assert found is not None
    assert found.name == "checkpoint_0"
    assert "checkpoint_1 is damaged" in caplog.text
    assert names(fresh) == ["checkpoint_0"]


def test_the_newest_overtakes_but_never_what_is_tagged(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go, under_way = threading.Event(), threading.Event()
    reserve_for = BucketBackend.reserve_for

    def slow(self: BucketBackend, *said: Any) -> Any:
        under_way.set()
        may_go.wait(20)
        return reserve_for(self, *said)

    monkeypatch.setattr(BucketBackend, "reserve_for", slow)
    store = mirrored(mirror_pending=2, retention=Retention(keep_last=1), mirror_retention=Retention())
    store.save(state(0))
    assert under_way.wait(20)
    store.save(state(1), tags=["keep"])
    for number in range(2, 6):
        store.save(state(number))
    assert names(store) == ["checkpoint_1", "checkpoint_5"]
    may_go.set()
    assert store.mirror is not None
    store.mirror.wait()
    copied = names(bucket_store())
    assert copied[-1] == "checkpoint_5"
    assert "checkpoint_1" in copied
    assert store.mirror.progress.skipped == 6 - len(copied) > 0
    assert all(report.sound for report in bucket_store().verify())
    assert uploads(store) == []


def test_the_mirror_is_pruned_by_the_same_rules(mirrored: Open, bucket_store: Open) -> None:
    store = mirrored(retention=Retention(keep_last=2))
    for number in range(4):
        store.save(state(number))
        assert store.mirror is not None
        store.mirror.wait()
    assert names(store) == names(bucket_store()) == ["checkpoint_2", "checkpoint_3"]
    assert bucket_store().list()[0].verify().sound


def test_a_mirror_that_fails_stops_nothing_and_is_tried_again(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = Objects.create
    broken = True

    def refused(self: Objects, key: str, data: bytes) -> bool:
        if broken:
            raise BucketError("the bucket is on fire")
        return create(self, key, data)

    monkeypatch.setattr(Objects, "create", refused)
    store = mirrored()
    store.save(state(0))
    assert store.mirror is not None
    with pytest.raises(MirrorError, match="on fire"):
        store.mirror.wait()
    store.mirror.wait()  # said once
    store.save(state(1))
    with pytest.warns(UserWarning, match="on fire"):
        store.mirror.wait(on_error="warn")
    assert names(store) == ["checkpoint_0", "checkpoint_1"]
    assert "was not mirrored" in caplog.text
    broken = False
    store.save(state(2))
    store.mirror.wait()
    assert names(bucket_store())[-1] == "checkpoint_2"


def test_another_runs_mirror_is_not_overwritten(mirrored: Open, bucket_store: Open) -> None:
    bucket_store().save(state(5))
    store = mirrored()
    assert store.save(state(0)).name == "checkpoint_1"


PROGRAM = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO)
from keepstep import Store
store = Store(sys.argv[1], mirror=sys.argv[2])
for number in range(int(sys.argv[3])):
    store.save({"model": {"weight": torch.full((int(sys.argv[4]),), float(number))}}, step=number)
print("saved", flush=True)
if sys.argv[5] == "sleep":
    import time
    time.sleep(60)
"""


def run(server: Server, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=server.environment(),
    )


def test_the_end_of_the_process_waits_for_the_upload(
    server: Server, tmp_path: Path, address: str, bucket_store: Open
) -> None:
    process = run(server, tmp_path / "run", address, 3, 3_000_000, "end")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "waiting for the upload" in log
    assert names(bucket_store())[-1] == "checkpoint_2"
    assert len(names(bucket_store())) > 1, "the newest was uploaded beside others"


def test_killed_in_the_middle_of_an_upload_the_next_start_goes_on(
    server: Server, tmp_path: Path, address: str, bucket_store: Open
) -> None:
    process = run(server, tmp_path / "run", address, 2, 12_000_000, "sleep")
    assert process.stdout is not None
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = names(bucket_store())
    assert before != ["checkpoint_0", "checkpoint_1"], "it was faster than the kill"
    store = Store(tmp_path / "run", mirror=address, storage_options=server.options())
    store.claim()
    assert store.mirror is not None
    store.mirror.wait()
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1"]
    assert all(report.sound for report in bucket_store().verify())
    assert uploads(store) == []
    assert torch.equal(bucket_store().list()[1].load()["model"]["weight"], torch.full((12_000_000,), 1.0))


def test_an_empty_directory_and_no_mirror_in_reach_is_no_fresh_start(tmp_path: Path) -> None:
    options = {"endpoint": "http://127.0.0.1:9", "access_key_id": "a", "secret_access_key": "b"}
    limits = {"max_retries": 1, "retry_timeout_s": 1, "connect_timeout_s": 1}
    store = Store(tmp_path, mirror="s3://tests/none", storage_options={**options, **limits})
    with pytest.raises(BucketError):
        store.load_latest_into(state(0))
