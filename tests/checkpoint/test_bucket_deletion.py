"""No deletion takes an object that a manifest names, whatever is saved meanwhile."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable, Iterable

import pytest
from obstore.store import MemoryStore
from tests.checkpoint.test_backend_contract import committed, entry, manifest_of

from keepstep.checkpoint.format.manifest import STATE_NAME
from keepstep.checkpoint.format.parse import check_files, read_manifest
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.bucket_writing import BucketWorkspace
from keepstep.checkpoint.place.objects import Objects
from keepstep.errors import DamagedCheckpointError, StoreBusyError

BASE = b"12345"
CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


class Watched(Objects):
    """Runs a step of somebody else's between the steps of a deletion."""

    before_delete: list[Callable[[], None]] | None = None

    def delete(self, keys: Iterable[str]) -> None:
        if self.before_delete:
            self.before_delete.pop(0)()
        super().delete(keys)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def linking(backend: BucketBackend, checkpoint: str) -> tuple[BucketWorkspace, str | None]:
    """A save under way, and where its base lies; None if it had to be written."""
    workspace = backend.reserve()
    workspace.write_file(STATE_NAME, b"{}")
    try:
        return workspace, workspace.link("base.bin", checkpoint, "base.bin", entry(BASE))
    except FileNotFoundError:
        workspace.write_file("base.bin", BASE)
        return workspace, None


def commit(backend: BucketBackend, begun: tuple[BucketWorkspace, str | None]) -> None:
    workspace, within = begun
    workspace.commit(manifest_of({STATE_NAME: entry(b"{}"), "base.bin": entry(BASE, within)}))
    backend.release(workspace)


@pytest.mark.parametrize("links_before", [True, False])
@pytest.mark.parametrize("same_backend", [True, False])
def test_a_save_that_links_during_a_deletion(
    store: MemoryStore, links_before: bool, same_backend: bool
) -> None:
    deleting = BucketBackend(Watched(store, "memory://run"))
    saving = deleting if same_backend else BucketBackend(Objects(store, "memory://run"))
    first = committed(deleting, {"base.bin": BASE})
    saving.claim()
    commit(saving, linking(saving, "checkpoint_0"))
    deleting.delete(first)  # the base stays: checkpoint_1 names it
    second = deleting.checkpoints()[-1][1]
    begun: list[tuple[BucketWorkspace, str | None]] = []

    def link() -> None:
        begun.append(linking(saving, "checkpoint_1"))

    if links_before:
        link()
    deleting._objects.before_delete = [  # type: ignore[attr-defined]
        (lambda: None) if links_before else link,
        lambda: commit(saving, begun[0]),
    ]
    deleting.delete(second)
    ((number, last),) = saving.checkpoints()
    assert number == 2
    check_files(last, read_manifest(last))


def test_who_was_taken_over_from_deletes_nothing(store: MemoryStore) -> None:
    backend = BucketBackend(Objects(store, "memory://run"))
    place = committed(backend, {"base.bin": BASE})
    backend._objects.put(
        ".keepstep/writer.json", b'{"host": "elsewhere", "boot": "b", "pid": 1, "started": 1}'
    )
    with pytest.raises(StoreBusyError, match="another process writes"):
        backend.delete(place)
    with pytest.raises(StoreBusyError, match="another process writes"):
        backend.set_aside(place)
    assert [number for number, _ in backend.checkpoints()] == [0]


@pytest.mark.parametrize("aside", [False, True])
def test_what_a_manifest_that_can_not_be_read_may_name_stays(store: MemoryStore, aside: bool) -> None:
    backend = BucketBackend(Objects(store, "memory://run"))
    first = committed(backend, {"base.bin": BASE, "own.bin": b"1"})
    commit(backend, linking(backend, "checkpoint_0"))
    key = "checkpoint_1/manifest.json"
    backend._objects.put(key, backend._objects.get(key).replace(b'"step": 1', b'"step": 2'))
    second = backend.checkpoints()[-1][1]
    with pytest.raises(DamagedCheckpointError):
        read_manifest(second)
    if aside:
        backend.set_aside(second)
    backend.delete(first)
    assert backend._objects.size("checkpoint_0/base.bin") == len(BASE)
    assert backend._objects.size("checkpoint_0/own.bin") is None
    BucketBackend(Objects(store, "memory://run")).claim()
    assert backend._objects.size("checkpoint_0/base.bin") == len(BASE)


def test_nothing_is_remembered_of_what_was_deleted(store: MemoryStore) -> None:
    """A run may commit, and delete, a million checkpoints."""
    backend = BucketBackend(Objects(store, "memory://run"))
    backend.claim()
    commit(backend, linking(backend, "none"))
    held: list[int] = []
    for _ in range(40):
        commit(backend, linking(backend, "none"))
        for _, place in backend.checkpoints():
            read_manifest(place)
        backend.delete(backend.checkpoints()[0][1])
        assert len(backend.checkpoints()) == 1
        held.append(held_bytes(backend))
    assert held[-1] - held[9] < 30 * 50, "less than a key a checkpoint"


def held_bytes(thing: object) -> int:
    """What can be reached from an object, but for code."""
    sizes: dict[int, int] = {}
    left = [thing]
    while left:
        found = left.pop()
        if id(found) not in sizes and not isinstance(found, CODE):
            sizes[id(found)] = sys.getsizeof(found)
            left += gc.get_referents(found)
    return sum(sizes.values())
