"""Bringing what the mirror has: past what is in the way, and however long it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.buckets.server import Server
from tests.buckets.test_mirror import mirrored, names
from tests.buckets.test_mirror_faults import flip, saved_and_mirrored
from tests.buckets.test_store import state
from tests.ranks.spawn import run_ranks

from keepstep import Store
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import BucketError, DirectoryNotOursError, RankFailedError, StoreError
from keepstep.world import Ranks

__all__ = ["mirrored"]

Open = Callable[..., Store]


# ---------------------------------------------------------------------------------- what is in the way


@pytest.mark.parametrize("what", ["lost", "cut", "overwritten"])
def test_a_directory_that_lost_its_manifest_is_set_aside_for_the_mirrors_copy(
    mirrored: Open, what: str
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    store.close()
    manifest = store.path / "checkpoint_1" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:100] if what == "cut" else bytes(100))
    if what == "lost":
        manifest.unlink()
    live = state(9)
    found = mirrored().load_latest_into(live)
    assert found is not None
    assert (found.name, live["progress"]["seed"]) == ("checkpoint_1", 1)
    assert found.verify().sound
    assert (store.path / ".keepstep" / "damaged" / "checkpoint_1" / "state.json").exists()


def test_what_is_not_ours_and_in_the_way_is_told_before_anything_is_fetched(
    mirrored: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    store.close()
    shutil.rmtree(store.path / "checkpoint_1")
    (store.path / "checkpoint_1").mkdir()
    (store.path / "checkpoint_1" / "notes.txt").write_text("mine")
    read: list[str] = []
    monkeypatch.setattr(Objects, "read_into", lambda _, key, *__: read.append(key))
    with pytest.raises(DirectoryNotOursError, match=r"notes\.txt"):
        mirrored().latest()
    assert read == []
    assert (store.path / "checkpoint_1" / "notes.txt").read_text() == "mine"


HOLDER = """
import sys
from pathlib import Path
from keepstep.locks import StoreLock
StoreLock.acquire(Path(sys.argv[1]), b"{}")
print("held", flush=True)
sys.stdin.read()
"""


def test_nothing_older_is_taken_where_another_process_writes(mirrored: Open) -> None:
    store = saved_and_mirrored(mirrored(), 1)
    old = store.path.with_name("old")
    shutil.copytree(store.path, old)
    saved_and_mirrored(store, 1)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(old / ".keepstep" / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(
            StoreError, match=r"checkpoint_1 is newer .*written to by .*Nothing older was taken"
        ):
            mirrored("old").latest()
        holder.stdin.close()
    assert names(Store(old)) == ["checkpoint_0"]


def test_large_files_come_in_several_ranges_at_once(mirrored: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    large = {"w": torch.arange(10_000_000, dtype=torch.float32)}  # five blocks
    store = mirrored()
    store.save(large)
    store.close()
    read_into, both = Objects.read_into, threading.Barrier(2)

    def met(self: Objects, key: str, view: memoryview, offset: int) -> int:
        if key.endswith("w.safetensors") and offset in (0, 8 << 20):
            both.wait(20)
        return read_into(self, key, view, offset)

    monkeypatch.setattr(Objects, "read_into", met)
    found = mirrored("elsewhere").latest()
    assert found is not None
    assert found.verify().sound
    assert torch.equal(found.load()["w"], large["w"])


# ----------------------------------------------------------------------------------------- many ranks


def slowly(argument: str, rank: int, size: int) -> None:
    """Whatever rank 0 brings takes longer than ranks wait for each other."""
    said = json.loads(argument)

    def opened(name: str) -> Store:
        where = {"mirror": said["address"], "storage_options": said["options"]}
        return Store(Path(said["path"]) / name, world=Ranks(timeout_s=4), **where)

    read_into = Objects.read_into

    def slow(self: Objects, key: str, view: memoryview, offset: int) -> int:
        time.sleep(5 if key.endswith("model.safetensors") else 0)
        return read_into(self, key, view, offset)

    Objects.read_into = slow  # type: ignore[method-assign]
    for name in ("fresh", "damaged"):  # nothing is there; the newest is damaged
        live = state(9)
        found = opened(name).load_latest_into(live)
        assert found is not None
        assert (found.name, live["progress"]["seed"]) == ("checkpoint_1", 1)
    assert (Path(said["path"]) / "damaged" / ".keepstep" / "damaged" / "checkpoint_1").exists()

    def broken(*_: Any) -> int:
        raise BucketError("the network is gone")

    Objects.read_into = broken  # type: ignore[method-assign]
    began_s = time.monotonic()
    kind = RankFailedError if rank else StoreError
    with pytest.raises(kind, match=r"checkpoint_1 is newer .*network is gone"):
        opened("third").load_latest_into(state(9))
    assert time.monotonic() - began_s < 3, "the others waited for their time-out"


@pytest.mark.timeout(120)
def test_ranks_wait_for_what_rank_0_brings_as_long_as_it_is_at_it(
    mirrored: Open, server: Server, address: str
) -> None:
    store = saved_and_mirrored(mirrored(), 2)
    store.close()
    damaged = store.path.with_name("damaged")  # the lock of the other one is this process's for good
    shutil.copytree(store.path, damaged)
    flip(damaged / "checkpoint_1" / "model.safetensors")
    said = {"address": address, "options": server.options(), "path": str(store.path.parent)}
    run_ranks(Path(__file__), "slowly", 2, json.dumps(said), timeout_s=100)
