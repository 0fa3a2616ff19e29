"""A store in a bucket does what a store in a directory does, on a real S3 server."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import ObjectStore
from tests.buckets.server import SECRET_KEY, Server

from keepstep import Checkpoint, Retention, Store
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import (
    BucketError,
    CheckpointNotFoundError,
    DigestError,
    MissingFileError,
    NoValidCheckpointError,
    StoreBusyError,
    UsageError,
)

Open = Callable[..., Store]


def state(seed: int = 0, size: int = 1000) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"weight": torch.randn(size, generator=generator), "bias": torch.full((3,), float(seed))},
        "base": {"frozen": torch.arange(400_000.0)},
        "progress": {"seed": seed, "seen": (1, 2)},
    }


def raw(store: Store) -> ObjectStore:
    """What obstore sees below a store."""
    objects = store._backend._objects  # type: ignore[attr-defined]
    assert isinstance(objects, Objects)
    return objects._store


def keys(store: Store) -> set[str]:
    return {meta["path"] for batch in obstore.list(raw(store)) for meta in batch}


def test_save_and_load(bucket_store: Open, address: str) -> None:
    saved = bucket_store().save(state(3), step=7, metrics={"loss": 0.5}, tags=["first"])
    assert str(saved.place) == f"{address}/checkpoint_0"
    assert address in repr(saved)
    found = bucket_store().latest()
    assert found is not None
    assert (found.name, found.step, found.metrics, found.tags) == (
        "checkpoint_0",
        7,
        {"loss": 0.5},
        ("first",),
    )
    loaded = found.load()
    assert torch.equal(loaded["model"]["weight"], state(3)["model"]["weight"])
    assert loaded["progress"] == {"seed": 3, "seen": (1, 2)}
    live = state(0)
    found.load_into(live)
    assert torch.equal(live["model"]["weight"], state(3)["model"]["weight"])
    assert found.verify().sound
    assert bucket_store().get("checkpoint_0").bytes == saved.bytes
    with pytest.raises(UsageError, match="no path"):
        _ = found.path


def test_several_parts_and_in_the_background(bucket_store: Open) -> None:
    store = bucket_store()
    large = state(1, size=7_000_001)  # 28 MB: four parts
    pending = store.save_in_background(large, step=1)
    assert pending.wait().verify().sound
    live = state(0, size=7_000_001)
    checkpoint = bucket_store().load_latest_into(live)
    assert checkpoint is not None
    assert torch.equal(live["model"]["weight"], large["model"]["weight"])


def test_best_list_delete_and_retention(bucket_store: Open) -> None:
    store = bucket_store(retention=Retention(keep_last=2, keep_best=("loss", "min", 1)))
    for number, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0]):
        store.save(state(number), step=number, metrics={"loss": loss})
    assert [c.name for c in store.list()] == ["checkpoint_1", "checkpoint_3", "checkpoint_4"]
    best = store.best("loss")
    assert best is not None
    assert best.name == "checkpoint_1"
    store.delete("checkpoint_3")
    with pytest.raises(CheckpointNotFoundError):
        store.get("checkpoint_3")
    assert all(report.sound for report in store.verify())
    store.save(state(9))
    assert store.list()[-1].name == "checkpoint_5"


def test_unchanged_segments_are_not_written_again_and_outlive_their_first_checkpoint(
    bucket_store: Open,
) -> None:
    store = bucket_store()
    for number in range(3):
        store.save(state(number), step=number)
    last = store.list()[-1]
    assert last.manifest.files["base.safetensors"].within == "checkpoint_0"
    assert "checkpoint_2/base.safetensors" not in keys(store)
    store.delete("checkpoint_0")
    store.delete("checkpoint_1")
    assert "checkpoint_0/base.safetensors" in keys(store)
    assert "checkpoint_0/model.safetensors" not in keys(store)
    assert torch.equal(last.load()["base"]["frozen"], torch.arange(400_000.0))
    store.delete("checkpoint_2")
    assert {key for key in keys(store) if key.endswith(".safetensors")} == set()


def test_falling_back_over_damage(bucket_store: Open, caplog: pytest.LogCaptureFixture) -> None:
    store = bucket_store()
    for number in range(4):
        store.save(state(number), step=number)
    data = bytearray(obstore.get(raw(store), "checkpoint_3/model.safetensors").bytes())
    data[-1] ^= 1
    obstore.put(raw(store), "checkpoint_3/model.safetensors", bytes(data))
    obstore.delete(raw(store), "checkpoint_2/model.safetensors")
    obstore.put(raw(store), "checkpoint_1/manifest.json", b"{}")
    with pytest.raises(DigestError):
        store.get("checkpoint_3").load()
    with pytest.raises(MissingFileError):
        store.get("checkpoint_2").load()
    live = state(9)
    found = bucket_store().load_latest_into(live)
    assert found is not None
    assert found.name == "checkpoint_0"
    assert live["progress"]["seed"] == 0
    assert [c.name for c in store.list()] == ["checkpoint_0"]
    assert ".keepstep/damaged/checkpoint_3/manifest.json" in keys(store)
    assert "checkpoint_3/model.safetensors" in keys(store), "quarantine deletes nothing"
    again = bucket_store()
    assert again.save(state(1)).name == "checkpoint_4"
    assert "checkpoint_3/model.safetensors" in keys(store), "nor does the next writer"
    again.delete("checkpoint_4")
    again.delete("checkpoint_0")
    with pytest.raises(NoValidCheckpointError):
        bucket_store().load_latest_into(live)


def test_a_partial_load_reads_only_what_it_needs(bucket_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = bucket_store()
    store.save(state(1, size=1_000_000))
    read: list[int] = []
    get_range = obstore.get_range

    def counted(store: ObjectStore, path: str, *, start: int, length: int) -> Any:
        read.append(length)
        return get_range(store, path, start=start, length=length)

    monkeypatch.setattr(obstore, "get_range", counted)
    found = store.latest()
    assert found is not None
    loaded = found.load(only="model/bias")
    assert loaded["model"]["bias"].tolist() == [1.0, 1.0, 1.0]
    assert sum(read) < 10_000


def half_a_save(address: str, server: Server) -> subprocess.CompletedProcess[str]:
    """A process that dies while it saves."""
    code = f"""
import os, torch
from keepstep import Store
store = Store({address!r}, storage_options={server.options()!r})
store.claim()
workspace = store._backend.reserve()
workspace.write_file("model.safetensors", b"half of it")
os._exit(1)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_what_a_dead_process_left_is_swept_and_its_number_is_burned(
    bucket_store: Open, server: Server, address: str
) -> None:
    assert half_a_save(address, server).stderr == ""
    assert "checkpoint_0/model.safetensors" in keys(bucket_store())
    assert bucket_store().latest() is None
    assert bucket_store().save(state(1)).name == "checkpoint_1"
    assert "checkpoint_0/model.safetensors" not in keys(bucket_store())
    assert [c.name for c in bucket_store().list()] == ["checkpoint_1"]


def test_a_second_process_of_this_host_is_refused_while_the_first_lives(
    bucket_store: Open, server: Server, address: str
) -> None:
    bucket_store().save(state(0))
    refused = half_a_save(address, server)
    assert re.search(r"StoreBusyError: .* by process \d+ on \S+, since 20\d\d-.* UTC\. One", refused.stderr)
    assert server.secret not in refused.stderr


def test_two_writers_take_different_numbers(bucket_store: Open) -> None:
    first, second = bucket_store(), bucket_store()
    first.claim()
    second.claim()
    barrier = threading.Barrier(2)
    saved: list[Checkpoint] = []

    def save(store: Store) -> None:
        barrier.wait()
        saved.extend(store.save(state(number)) for number in range(3))

    threads = [threading.Thread(target=save, args=(store,)) for store in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({c.name for c in saved}) == 6
    assert all(report.sound for report in bucket_store().verify())


def test_who_was_taken_over_from_can_commit_no_more(bucket_store: Open) -> None:
    old, new = bucket_store(), bucket_store()
    old.save(state(0))
    late = old._backend.reserve()
    late.write_file("state.json", b"{}")
    # What another host's process would do: it can't know whether this one lives.
    obstore.put(
        raw(new), ".keepstep/writer.json", b'{"host": "elsewhere", "boot": "b", "pid": 1, "started": 1}'
    )
    with pytest.raises(StoreBusyError, match="another process writes"):
        old.save(state(1))
    with pytest.raises(StoreBusyError):
        late.commit(b"{}")
    assert [c.name for c in new.list()] == ["checkpoint_0"]


def test_the_environment_is_enough(server: Server, address: str) -> None:
    code = f"""
import torch
from keepstep import Store
store = Store({address!r})
store.save({{"x": torch.ones(3)}})
print(repr(store), store.latest())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=server.environment()
    )
    assert done.returncode == 0, done.stderr
    assert server.secret not in done.stdout + done.stderr


def test_a_profile_is_enough(s3: Server, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        f"[train]\naws_access_key_id = keepstep-test\naws_secret_access_key = {SECRET_KEY}\n"
    )
    (tmp_path / "config").write_text(f"[profile train]\nregion = us-east-1\nendpoint_url = {s3.endpoint}\n")
    environment = {name: value for name, value in s3.environment().items() if not name.startswith("AWS")}
    environment |= {
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_PROFILE": "train",
    }
    code = """
import torch
from keepstep import Store
Store("s3://tests/by-profile", storage_options={"timeout_s": 20}).save({"x": torch.ones(3)})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_no_secret_is_shown_or_stored(server: Server, address: str, caplog: pytest.LogCaptureFixture) -> None:
    wrong = "d3Jvbmctc2VjcmV0LTc3YWE="  # keys of Azure are in base64
    with caplog.at_level(logging.DEBUG):
        refused = server.options(**{server.secret_option: wrong, "max_retries": 0})
        store = Store(address, storage_options=refused)
        with pytest.raises(BucketError) as caught:
            store.save(state())
        good = Store(address, storage_options=server.options())
        good.save(state())
    shown = f"{caught.value!r} {caught.value.__cause__!r} {store!r} {good!r} {vars(good)!r} {caplog.text}"
    assert wrong not in shown
    assert server.secret not in shown
    assert address in str(caught.value)
    for key in keys(good):
        assert server.secret.encode() not in bytes(obstore.get(raw(good), key).bytes())


def test_odd_addresses_are_refused() -> None:
    for bad in ("s3://user:secret@bucket/run", "s3://bucket/run?x=1", "ftp://bucket/run", "s3://"):
        with pytest.raises(UsageError) as caught:
            Store(bad)
        assert "secret@" not in str(caught.value)
    with pytest.raises(UsageError, match="pass it as a string"):
        Store(Path("s3://bucket/run"))


def test_without_obstore_the_error_names_the_extra() -> None:
    code = """
import sys
sys.modules["obstore"] = None
from keepstep import Store
try:
    Store("s3://bucket/run")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'keepstep[objects]'" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("bucket", "options", "told"),
    [
        ("nowhere", {}, "there is no bucket s3://nowhere (NoSuchBucket)"),
        ("tests", {"secret_access_key": "mistyped"}, "accept the credentials for s3://tests (SignatureDoes"),
        (
            "tests",
            {"access_key_id": "mistyped"},
            "accept the credentials for s3://tests (InvalidAccess",
        ),
        ("tests", {"skip_signature": True}, "permission denied on s3://tests (AccessDenied)"),
    ],
)
def test_refusals_say_what_happened_to_which_bucket_and_what_to_do(
    s3: Server, bucket: str, options: dict[str, Any], told: str
) -> None:
    store = Store(f"s3://{bucket}/refused", storage_options=s3.options(**options))
    with pytest.raises(BucketError) as caught:
        store.list()
    assert told in str(caught.value)
    assert "<" not in str(caught.value)
    assert "Debug" not in str(caught.value)


# The server of S3 makes one with its first object.
@pytest.mark.parametrize("server", ["gcs", pytest.param("azure", marks=pytest.mark.soak)], indirect=True)
def test_a_bucket_that_is_not_there_is_named(server: Server) -> None:
    missing = server.root.replace("tests", "nowhere")
    store = Store(f"{missing}/run", storage_options=server.options())
    for touch in (store.list, lambda: store.save(state())):
        with pytest.raises(BucketError, match=f"there is no bucket {missing} "):
            touch()


def test_without_credentials_the_error_says_where_to_put_them(
    s3: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {"endpoint": s3.endpoint, "region": "us-east-1", "max_retries": 0}
    nobody = {"metadata_endpoint": "http://127.0.0.1:9", "imdsv1_fallback": False}
    with pytest.raises(BucketError, match=r"no credentials for s3://tests were found.*AWS_ACCESS_KEY_ID"):
        Store("s3://tests/run", storage_options={**options, **nobody}).list()
