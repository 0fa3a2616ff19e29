"""Two who save under one name in a bucket: whatever the order of events, one whole checkpoint or none."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from tests.buckets.proxy import Answer, Proxy
from tests.buckets.server import Server
from torch.distributed.checkpoint.api import CheckpointException

import keepstep
from keepstep import Checkpoint, Store
from keepstep.checkpoint.place import bucket_named
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.claimant import Claimant, this_process
from keepstep.checkpoint.place.in_use import KeysInUse
from keepstep.checkpoint.place.objects import Objects
from keepstep.checkpoint.place.registry import open_bucket
from keepstep.errors import BucketError, DirectoryNotOursError, StoreBusyError

_here = threading.local()


def _claimant() -> Claimant:
    host = getattr(_here, "host", None)
    return replace(this_process(), host=host) if host else this_process()


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that says so is a process of another host."""
    monkeypatch.setattr(bucket_named, "this_process", _claimant)
    monkeypatch.setattr(KeysInUse, "begin", lambda *_: True)


class Names:
    """Saves under names in one place."""

    def __init__(self, server: Server, address: str) -> None:
        self.address = address
        self.options = server.options()

    def save(self, name: str, value: float, **how: Any) -> None:
        writer = keepstep.dcp.StorageWriter(f"{self.address}/{name}", storage_options=self.options, **how)
        state = {"a": {"w": torch.full((1 << 16,), value)}, "b": {"w": torch.full((9,), value)}}
        torch_dcp.save(state, storage_writer=writer, no_dist=True)

    def value(self, name: str) -> float:
        made = Checkpoint.open(f"{self.address}/{name}", storage_options=self.options)
        assert made.verify().sound
        state = made.load()
        (value,) = {*state["a"]["w"].unique().tolist(), *state["b"]["w"].unique().tolist()}
        return float(value)

    def backend(self) -> BucketBackend:
        return open_bucket(self.address, self.options)

    def objects(self) -> Objects:
        return Objects.open(self.address, self.options)

    def sizes(self, name: str) -> dict[str, int]:
        return {found.key: found.bytes for found in self.objects().list(name)}


@pytest.fixture
def names(server: Server, address: str) -> Names:
    return Names(server, address)


class Stalled:
    """A save by another host, in a thread, that waits before one request until it is told to go on."""

    def __init__(
        self, names: Names, monkeypatch: pytest.MonkeyPatch, method: str, until: Callable[[str], bool]
    ) -> None:
        self._reached, self._go_on = threading.Event(), threading.Event()
        self._done: Future[None] = Future()
        plain = getattr(Objects, method)

        def request(objects: Objects, key: str, *more: Any) -> Any:
            if not self._reached.is_set() and until(key):  # what it asks for, and no other yet
                self._reached.set()
                assert self._go_on.wait(20)
            return plain(objects, key, *more)

        def run() -> None:
            _here.host = "another"
            try:
                names.save("step_1", 1.0)
            except BaseException as error:  # noqa: BLE001  (raised by `end`)
                self._done.set_exception(error)
            else:
                self._done.set_result(None)

        monkeypatch.setattr(Objects, method, request)
        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert self._reached.wait(20)

    def end(self) -> None:
        self._go_on.set()
        self._thread.join(20)
        self._done.result(0)


SEGMENT = "put", lambda key: key.endswith("a.safetensors")
DECISION = "create", lambda key: "/attempt_" in key and key.endswith("manifest.json")
PUBLICATION = "create", lambda key: key == "step_1/manifest.json"


@pytest.mark.parametrize("at", [SEGMENT, DECISION], ids=["segment", "decision"])
@pytest.mark.usefixtures("two_hosts")
def test_the_last_to_come_has_the_name_and_a_late_one_changes_nothing(
    names: Names, monkeypatch: pytest.MonkeyPatch, at: tuple[str, Callable[[str], bool]]
) -> None:
    zombie = Stalled(names, monkeypatch, *at)
    names.save("step_1", 2.0)
    assert names.value("step_1") == 2.0
    with pytest.raises(CheckpointException, match="has given up this attempt"):
        zombie.end()
    assert names.value("step_1") == 2.0


@pytest.mark.parametrize("at", [SEGMENT, DECISION], ids=["segment", "decision"])
@pytest.mark.usefixtures("two_hosts")
def test_a_late_one_that_ends_while_the_other_saves_commits_nothing(
    names: Names, monkeypatch: pytest.MonkeyPatch, at: tuple[str, Callable[[str], bool]]
) -> None:
    zombie = Stalled(names, monkeypatch, *at)
    workspace = names.backend().reserve_named("step_1")
    with pytest.raises(CheckpointException, match="has given up this attempt"):
        zombie.end()
    assert not workspace.final.exists()
    names.save("step_1", 3.0)  # and this one takes it from that
    assert names.value("step_1") == 3.0
    with pytest.raises(StoreBusyError, match="has given up this attempt"):
        workspace.commit(b"{}")
    workspace.discard()
    assert names.value("step_1") == 3.0


@pytest.mark.usefixtures("two_hosts")
def test_what_was_decided_is_published_by_whoever_comes_and_never_replaced(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Stalled(names, monkeypatch, *PUBLICATION)
    with pytest.raises(CheckpointException, match="had been decided, and is published now"):
        names.save("step_1", 2.0)
    assert names.value("step_1") == 1.0
    late.end()
    assert names.value("step_1") == 1.0


@pytest.mark.usefixtures("two_hosts")
def test_a_rank_that_is_late_writes_where_nobody_looks(names: Names) -> None:
    _here.host = "another"
    try:
        host = names.backend().reserve_named("step_1")
    finally:
        del _here.host
    invitation = host.invitation()
    inside, outside = names.backend().guest(), names.backend().guest()
    inside.accept(invitation)
    inside.open()
    names.save("step_1", 2.0)
    inside.write_file("a.safetensors", b"late")
    assert names.value("step_1") == 2.0
    inside.discard()
    outside.accept(invitation)
    with pytest.raises(BucketError, match="is not what rank 0 has begun"):
        outside.open()
    host.discard()
    assert names.value("step_1") == 2.0


@pytest.mark.usefixtures("two_hosts")
def test_of_two_that_begin_at_once_one_hears_of_the_other_and_the_name_stays_usable(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[Any] = []
    plain = Objects.create

    def between(self: Objects, key: str, data: bytes) -> bool:
        if not others and "/attempt_" in key:  # it has put its claim
            others.append(None)
            others[0] = names.backend().reserve_named("step_1")
        return plain(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(Objects, "create", between)
        with pytest.raises(StoreBusyError, match="has given up this attempt"):
            names.backend().reserve_named("step_1")
    others[0].discard()
    names.save("step_1", 4.0)
    assert names.value("step_1") == 4.0


def test_one_process_saves_once_at_a_time_under_a_name_and_again_after_a_failure(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Stalled(names, monkeypatch, *SEGMENT)
    with pytest.raises(CheckpointException, match="is being saved by this process already"):
        names.save("step_1", 2.0)
    first.end()
    assert names.value("step_1") == 1.0
    plain = Objects.put

    def refused(self: Objects, key: str, data: Any) -> None:
        if key.endswith("b.safetensors"):
            raise BucketError("refused")
        plain(self, key, data)

    with monkeypatch.context() as patched:
        patched.setattr(Objects, "put", refused)
        with pytest.raises(CheckpointException, match="refused"):
            names.save("step_2", 1.0)
    names.save("step_2", 2.0)
    assert names.value("step_2") == 2.0


@pytest.mark.usefixtures("two_hosts")
def test_a_store_deletes_and_sweeps_what_was_saved_under_its_names(
    names: Names, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.save("checkpoint_7", 7.0)
    names.backend().reserve_named("checkpoint_8").write_file("a.safetensors", b"left")
    _here.host = "another"
    try:
        late = names.backend().reserve_named("checkpoint_9")
        late.write_file("a.safetensors", b"left")
    finally:
        del _here.host
    store = Store(names.address, storage_options=server.options())
    store.save({"n": 1})
    assert [checkpoint.name for checkpoint in store.list()] == ["checkpoint_7", "checkpoint_10"]
    with pytest.raises(StoreBusyError, match="was not committed"):
        late.commit(b"{}")
    assert [key for key, size in names.sizes("checkpoint_9").items() if size] == ["checkpoint_9/claim.json"]
    assert any(names.sizes("checkpoint_8").values())  # of this process, and perhaps under way
    store.delete(store.list()[0])
    assert not any(names.sizes("checkpoint_7").values())
    with pytest.raises(CheckpointException, match="Choose another name"):
        names.save("checkpoint_9", 9.0)
    names.save("checkpoint_7", 8.0)
    assert names.value("checkpoint_7") == 8.0
    names.save("checkpoint_11", 11.0)  # the number that the store would give next
    store.save({"n": 2})
    assert [checkpoint.name for checkpoint in store.list()] == [f"checkpoint_{n}" for n in (7, 10, 11, 12)]
    aside = store._backend.set_aside(names.backend().at("checkpoint_7"))
    with pytest.raises(CheckpointException, match="Choose another name"):
        names.save("checkpoint_7", 9.0)
    assert any(key.endswith("a.safetensors") for key in names.sizes("checkpoint_7")), aside


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with Proxy(server.port) as found:
        yield found


def test_a_claim_whose_answer_was_lost_is_this_process_s_own(
    names: Names, server: Server, proxy: Proxy
) -> None:
    seen: dict[str, int] = {}

    def lost_once(request: Any) -> Answer | None:
        claims = request.method == "PUT" and request.path.endswith("claim.json")
        seen[request.path] = seen.get(request.path, 0) + 1
        return Answer(cut=True) if claims and seen[request.path] == 1 else None

    proxy.rule = lost_once
    options: Mapping[str, Any] = server.options(endpoint=proxy.endpoint)
    through = open_bucket(names.address, options)
    through.reserve_in_place_of("trial").discard()
    through.reserve_named("step_1").discard()
    through.reserve_for("checkpoint_1", "of a mirrored one").discard()
    assert max(seen.values()) > 1
    names.save("step_1", 1.0)
    assert names.value("step_1") == 1.0


@pytest.mark.parametrize("cut_off", ["claim", "look"])
def test_whose_objects_lie_under_a_name_is_asked_by_each_attempt_to_mirror_there(
    names: Names, server: Server, proxy: Proxy, cut_off: str
) -> None:
    """Also if the answer to an earlier one's claim was lost, or it came no further than that."""
    names.objects().put("checkpoint_0/base.safetensors", b"linked by another run's")
    before = names.sizes("")
    met: list[str] = []

    def once(request: Any) -> Answer | None:
        claims = request.method == "PUT" and request.path.endswith("checkpoint_0/claim.json")
        looks = request.method == "GET" and "prefix=" in request.path and "checkpoint_0" in request.path
        if not (claims if cut_off == "claim" else looks) or request.path in met:
            return None
        met.append(request.path)
        return Answer(cut=True) if claims else Answer(status=500, applied=False)

    proxy.rule = once
    options = server.options(endpoint=proxy.endpoint, max_retries=1 if cut_off == "claim" else 0)
    through = open_bucket(names.address, options)
    if cut_off == "look":
        with pytest.raises(BucketError, match="500"):
            through.reserve_for("checkpoint_0", "of this run")
    with pytest.raises(DirectoryNotOursError, match="belongs to another checkpoint"):
        through.reserve_for("checkpoint_0", "of this run")
    assert names.sizes("") == before


def test_what_is_committed_or_of_others_is_refused_before_anything_is_written(names: Names) -> None:
    names.save("step_1", 1.0)
    names.objects().put("data/train.bin", b"x")
    before = names.sizes("")
    for name in ("step_1", "data"):
        with pytest.raises(DirectoryNotOursError):
            names.backend().reserve_named(name)
    assert names.sizes("") == before


def test_what_lies_below_an_attempt_is_a_whole_checkpoint_once_it_is_copied_into_a_directory(
    names: Names, tmp_path: Path
) -> None:
    names.save("step_1", 5.0)
    (home,) = {key.rpartition("/")[0] for key in names.sizes("step_1")} - {"step_1"}
    for key in names.sizes(home):
        (tmp_path / key.rpartition("/")[2]).write_bytes(names.objects().get(key))
    made = Checkpoint.open(tmp_path)
    assert made.verify().sound
    assert made.load()["a"]["w"].unique().tolist() == [5.0]


@pytest.mark.parametrize("what", ["decision", "publication"])
def test_a_put_without_an_answer_is_a_commit_and_one_that_fails_for_good_leaves_one_or_none(
    names: Names, server: Server, proxy: Proxy, what: str
) -> None:
    ends = {"decision": r"/step_\d/attempt_\w+/manifest.json$", "publication": r"/step_\d/manifest.json$"}[
        what
    ]
    cut: list[str] = []

    def lost(request: Any) -> Answer | None:
        if request.method != "PUT" or not re.search(ends, request.path) or request.path in cut:
            return None
        cut.append(request.path)
        return Answer(cut=True)

    def refused(request: Any) -> Answer | None:
        found = request.method == "PUT" and re.search(ends, request.path)
        return Answer(status=503, applied=False) if found else None

    direct = names.options
    names.options = server.options(endpoint=proxy.endpoint, max_retries=1, retry_timeout_s=1)
    proxy.rule = lost
    names.save("step_1", 1.0)
    assert names.value("step_1") == 1.0
    assert cut
    proxy.rule = refused
    with pytest.raises(CheckpointException, match="503"):
        names.save("step_2", 1.0)
    names.options = direct
    if what == "decision":  # nobody ever heard of it
        names.save("step_2", 2.0)
        assert names.value("step_2") == 2.0
    else:
        with pytest.raises(CheckpointException, match="had been decided, and is published now"):
            names.save("step_2", 2.0)
        assert names.value("step_2") == 1.0
