"""What was cut off, lost, or left by others keeps a mirror from nothing but that."""

from __future__ import annotations

import datetime as dt
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from tests.buckets.proxy import Answer, Proxy, Request
from tests.buckets.server import Server
from tests.buckets.test_faults import proxy
from tests.buckets.test_mirror import mirrored, names
from tests.buckets.test_mirror_faults import saved_and_mirrored
from tests.buckets.test_store import keys, raw, state

from keepstep import Retention, Store
from keepstep.checkpoint.place import bucket_reading
from keepstep.checkpoint.place.bucket_writing import BucketWorkspace
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import BucketError, MirrorError

__all__ = ["mirrored", "proxy"]

Open = Callable[..., Store]


def until_mirrored(store: Store) -> Store:
    store.claim()
    assert store.mirror is not None
    store.mirror.wait()
    return store


def test_an_upload_that_rested_for_more_than_a_day_is_made_anew(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    with monkeypatch.context() as patched:

        def cut_off(*_: Any) -> None:
            raise BucketError("the power failed")

        patched.setattr(BucketWorkspace, "commit", cut_off)
        store.save(state(1))
        assert store.mirror is not None
        with pytest.raises(MirrorError, match="power failed"):
            store.mirror.wait()
    store.close()
    assert "checkpoint_1/model.safetensors" in keys(bucket_store())
    claim = obstore.get(raw(bucket_store()), "checkpoint_1/claim.json").bytes()
    of_a_dead_process = json.dumps({**json.loads(bytes(claim)), "started": 1}).encode()
    obstore.put(raw(bucket_store()), "checkpoint_1/claim.json", of_a_dead_process)
    with monkeypatch.context() as patched:
        patched.setattr(bucket_reading, "_LONG_DEAD", dt.timedelta(0))
        until_mirrored(mirrored())
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1"]
    assert all(report.sound for report in bucket_store().verify())


def test_what_was_given_up_lately_stays_so(mirrored: Open, bucket_store: Open) -> None:
    """A late commit of the old attempt may still be on its way."""
    store = mirrored()
    store.save(state(0))
    copies = bucket_store()
    manifest = store.list()[0].manifest
    backend: Any = copies._backend
    obstore.put(raw(copies), "checkpoint_0/claim.json", backend._claim(checkpoint=manifest.id))
    obstore.put(raw(copies), "checkpoint_0/manifest.json", b"")
    backend.reserve_for("checkpoint_0", manifest.id)
    assert "checkpoint_0/manifest.json" in keys(copies)


def test_objects_that_other_checkpoints_link_are_not_taken_for_the_uploads_own(
    mirrored: Open, bucket_store: Open
) -> None:
    first = saved_and_mirrored(mirrored(), 2)
    bucket_store().delete("checkpoint_0")
    linked = "checkpoint_0/base.safetensors"
    assert linked in keys(bucket_store())
    other: dict[str, Any] = {"base": {"frozen": state()["base"]["frozen"] + 1}}
    alone = Store(first.path.with_name("other"))
    manifest = alone.save(other).manifest
    bytes_there = obstore.get(raw(bucket_store()), linked).bytes()
    late = Store(
        alone.path, mirror=str(bucket_store().address), storage_options=first._blueprint.storage_options
    )
    late.claim()
    assert late.mirror is not None
    with pytest.raises(MirrorError, match="belongs to another checkpoint"):
        late.mirror.wait()
    assert obstore.get(raw(bucket_store()), linked).bytes() == bytes_there
    assert manifest.id not in [checkpoint.manifest.id for checkpoint in bucket_store().list()]
    assert "checkpoint_0/claim.json" not in keys(bucket_store())


def test_a_dropped_checkpoint_of_the_same_run_may_come_back(mirrored: Open, bucket_store: Open) -> None:
    keeps = {"mirror_retention": Retention(keep_last=1)}
    saved_and_mirrored(mirrored(**keeps), 2).close()
    assert "checkpoint_0/base.safetensors" in keys(bucket_store())
    until_mirrored(mirrored(mirror_retention=Retention()))
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1"]
    assert all(report.sound for report in bucket_store().verify())


def test_a_failure_that_was_made_good_is_not_told_at_the_end(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = mirrored()
    with monkeypatch.context() as patched:
        failed = threading.Event()

        def refused(*_: Any) -> bool:
            failed.set()
            raise BucketError("the network is away")

        patched.setattr(Objects, "create", refused)
        store.save(state(0))
        assert failed.wait(20)
        assert store.mirror is not None
        while store.mirror.progress.failed == 0:
            failed.wait(0.01)
    store.save(state(1))
    store.close()
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_1"]


def test_a_failure_that_nothing_made_good_is_told_at_the_end(
    mirrored: Open, bucket_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    obstore.put(raw(bucket_store()), "checkpoint_1/claim.json", b"{}")  # another run takes that number
    store.save(state(1))
    assert store.mirror is not None
    while store.mirror.progress.failed == 0:
        threading.Event().wait(0.01)
    store.save(state(2))
    with pytest.raises(MirrorError, match="belongs to another checkpoint"):
        store.close()
    assert names(bucket_store()) == ["checkpoint_0", "checkpoint_2"]


def test_one_that_lacks_a_file_keeps_no_other_from_the_mirror(
    mirrored: Open, bucket_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = Store(tmp_path / "run")
    for number in range(3):
        alone.save(state(number))
    (alone.path / "checkpoint_0" / "model.safetensors").unlink()
    (alone.path / "checkpoint_1" / "model.safetensors").write_bytes(b"cut")
    until_mirrored(mirrored(mirror_pending=9)).close()
    assert names(bucket_store()) == ["checkpoint_2"]
    assert caplog.text.count("is not mirrored: ") == 2


def test_501_in_a_name_is_no_refusal_of_create_only_puts(proxy: Proxy, server: Server, address: str) -> None:
    limits = {"timeout_s": 3, "max_retries": 0, "retry_timeout_s": 1}
    objects = Objects.open(f"{address}-501", server.options(endpoint=proxy.endpoint, **limits))

    def refuse(request: Request) -> Answer | None:
        return Answer(status=403, applied=False) if request.method == "PUT" else None

    proxy.rule = refuse
    with pytest.raises(BucketError, match="permission denied"):
        objects.create("checkpoint_501/claim.json", b"{}")
