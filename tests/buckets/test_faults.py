"""A bucket that times out, answers 500 and 503, refuses create-only puts, hangs up, or is killed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.buckets.proxy import Answer, Proxy, Request
from tests.buckets.server import Server
from tests.buckets.test_store import keys, state

from keepstep import Store
from keepstep.errors import BackgroundSaveError, BucketError, StoreBusyError

SHORT = {"timeout_s": 3, "max_retries": 2, "retry_timeout_s": 6}
Open = Callable[..., Store]


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def through(proxy: Proxy, server: Server, address: str) -> Open:
    """Opens a store that is reached through the proxy."""

    def open_store(**more: Any) -> Store:
        options = server.options(endpoint=proxy.endpoint, **{**SHORT, **more})
        return Store(address, storage_options=options)

    return open_store


def whole(store: Store, count: int) -> None:
    """The store holds so many checkpoints, and all are sound."""
    reports = store.verify()
    assert [report.problems for report in reports] == [()] * count


def is_manifest(request: Request) -> bool:
    return request.creates and request.path.endswith("/manifest.json")


def first(
    times: int, chosen: Callable[[Request], bool], answer: Answer
) -> Callable[[Request], Answer | None]:
    """Answers so to the first requests that are chosen."""
    left = [times]
    lock = threading.Lock()

    def rule(request: Request) -> Answer | None:
        with lock:
            if left[0] and chosen(request):
                left[0] -= 1
                return answer
        return None

    return rule


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_burst_of_refusals_is_sat_out(through: Open, proxy: Proxy, bucket_store: Open, status: int) -> None:
    store = through(max_retries=5, retry_timeout_s=30)
    proxy.rule = first(4, lambda request: request.method == "PUT", Answer(status=status, applied=False))
    store.save(state(1))
    proxy.rule = first(3, lambda request: request.method == "GET", Answer(status=status, applied=False))
    latest = store.latest()
    assert latest is not None
    assert latest.load()["progress"]["seed"] == 1
    whole(bucket_store(), 1)


@pytest.mark.parametrize("what", ["segment", "state.json", "manifest.json"])
def test_a_lasting_refusal_is_a_clear_error_and_nothing_is_committed(
    through: Open, proxy: Proxy, bucket_store: Open, address: str, what: str
) -> None:
    store = through()
    store.save(state(0))
    name = "model.safetensors" if what == "segment" else what

    def broken(request: Request) -> Answer | None:
        chosen = request.method == "PUT" and request.path.endswith(f"checkpoint_1/{name}")
        return Answer(status=503, applied=False) if chosen else None

    proxy.rule = broken
    with pytest.raises(BucketError) as caught:
        store.save(state(1))
    for part in (address, f"checkpoint_1/{name}", "503", "retry_timeout_s", "Older checkpoints are whole"):
        assert part in str(caught.value)
    whole(bucket_store(), 1)
    proxy.rule = lambda request: None
    assert store.save(state(2)).step is None
    whole(bucket_store(), 2)


def test_a_put_that_was_applied_though_its_answer_was_lost_is_a_commit(
    through: Open, proxy: Proxy, bucket_store: Open
) -> None:
    store = through()
    proxy.rule = first(1, is_manifest, Answer(cut=True))
    store.save(state(1))
    whole(bucket_store(), 1)
    proxy.rule = first(1, is_manifest, Answer(delay_s=5))  # past the time-out
    store.save(state(2))
    whole(bucket_store(), 2)
    proxy.rule = first(9, is_manifest, Answer(status=500))
    store.save(state(3))
    whole(bucket_store(), 3)


def test_a_put_that_arrives_after_its_save_was_given_up_commits_nothing(
    through: Open, proxy: Proxy, bucket_store: Open, server: Server
) -> None:
    store = through(max_retries=0)
    held: list[Request] = []

    def hold(request: Request) -> Answer | None:
        if is_manifest(request) and not held:
            held.append(request)
            return Answer(status=500, applied=False)
        return None

    proxy.rule = hold
    with pytest.raises(BucketError):
        store.save(state(1))
    late = bucket_store()._backend._objects  # type: ignore[attr-defined]
    assert not late.create("checkpoint_0/manifest.json", b"the late one"), "the key is taken"
    assert bucket_store().list() == []
    assert store.save(state(2)).name == "checkpoint_1"
    whole(bucket_store(), 1)


@pytest.mark.parametrize("status", [501, 412])
def test_a_server_that_refuses_create_only_puts(through: Open, proxy: Proxy, status: int) -> None:
    proxy.rule = lambda request: Answer(status=status, applied=False) if request.creates else None
    with pytest.raises(BucketError, match="create-only puts"):
        through().save(state(1))


def test_a_server_that_ignores_the_condition(through: Open, proxy: Proxy) -> None:
    proxy.rule = lambda request: Answer(status=200, applied=False) if request.creates else None
    with pytest.raises(BucketError, match="create-only puts"):
        through().save(state(1))


def test_time_outs_end(through: Open, proxy: Proxy) -> None:
    store = through(timeout_s=0.3, max_retries=1, retry_timeout_s=1)
    proxy.rule = lambda request: Answer(delay_s=3)
    began_s = time.monotonic()
    with pytest.raises(BucketError, match="timeout_s"):
        store.save(state(1))
    assert time.monotonic() - began_s < 10


def test_a_connection_lost_half_way_is_made_again(through: Open, proxy: Proxy, bucket_store: Open) -> None:
    bucket_store().save(state(4, size=1_000_000))
    store = through(max_retries=5, retry_timeout_s=20)
    proxy.rule = first(
        3, lambda r: r.method == "GET" and r.path.endswith("model.safetensors"), Answer(cut=True)
    )
    live = state(0, size=1_000_000)
    found = store.load_latest_into(live)
    assert found is not None
    assert torch.equal(live["model"]["weight"], state(4, size=1_000_000)["model"]["weight"])


def test_a_bucket_that_does_not_answer_is_not_a_damaged_checkpoint(
    through: Open, proxy: Proxy, bucket_store: Open
) -> None:
    bucket_store().save(state(1))
    store = through(max_retries=1)
    proxy.rule = lambda r: Answer(status=503, applied=False) if r.path.endswith("model.safetensors") else None
    with pytest.raises(BucketError):
        store.load_latest_into(state(0))
    assert [c.name for c in bucket_store().list()] == ["checkpoint_0"], "not set aside"


# ---------------------------------------------------------------------------------------- real kills


def test_the_server_is_killed_in_the_middle_of_uploads_and_comes_back(server: Server, tmp_path: Path) -> None:
    server = type(server)(tmp_path / "server")  # of the same kind
    server.start()
    server.make_bucket()
    try:
        options = server.options(max_retries=20, retry_timeout_s=60)
        store = Store(f"{server.root}/run", storage_options=options)
        store.save({"model": {"weight": torch.zeros(10)}}, step=0)
        large = {"model": {"weight": torch.arange(20_000_000.0)}}
        pending = store.save_in_background(large, step=1)
        time.sleep(0.15)
        assert not pending.done(), "the save was faster than the kill"
        server.kill()
        time.sleep(0.5)
        server.start()
        with contextlib.suppress(BackgroundSaveError):  # sat out, or refused: both are allowed
            pending.wait()
        if len(store.list()) == 1:
            store.save(large, step=1)
        whole(store, 2)
        assert torch.equal(store.list()[-1].load()["model"]["weight"], large["model"]["weight"])
    finally:
        server.kill()


PROGRAM = """
import sys, torch
from keepstep import Store
store = Store(sys.argv[1], storage_options=dict(max_retries=3))
for number in range(100):
    store.save({"model": {"weight": torch.full((3_000_000,), float(number))}}, step=number)
    print(number, flush=True)
"""


def test_the_writer_is_killed_at_any_moment(server: Server, address: str, bucket_store: Open) -> None:
    at_least = 0
    for delay_s in (0.0, 0.13, 0.31):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, address],
            stdout=subprocess.PIPE,
            text=True,
            env=server.environment(),
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        process.kill()
        told = process.stdout.read().split()
        process.communicate()
        at_least += 1 + len(told)
        reports = bucket_store().verify()
        assert all(report.sound for report in reports)
        assert len(reports) in (at_least, at_least + 1)
        at_least = len(reports)
    store = bucket_store()
    store.save(state(1))
    assert all(report.sound for report in store.verify())
    committed = {checkpoint.name for checkpoint in store.list()}
    data = {key.partition("/")[0] for key in keys(store) if key.endswith(".safetensors")}
    assert data == committed, "nothing is left of the dead"


def test_no_writer_commits_after_another_one_took_over(
    through: Open, proxy: Proxy, bucket_store: Open
) -> None:
    """The other one sweeps while this one is between its last check and its commit."""
    store = through()

    def sweep_first(request: Request) -> Answer | None:
        if is_manifest(request) and request.headers.get("content-length") != "0":
            other = bucket_store()._backend
            other._objects.create("checkpoint_0/manifest.json", b"")  # type: ignore[attr-defined]
        return None

    proxy.rule = sweep_first
    with pytest.raises(StoreBusyError):
        store.save(state(1))
    assert bucket_store().list() == []
