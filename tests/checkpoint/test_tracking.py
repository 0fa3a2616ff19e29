"""Memory is taken for unchanged only if the kernel says that nothing has written to it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.forked import in_fork

from keepstep.checkpoint.dcp import memory
from keepstep.checkpoint.format.manifest import digest_of
from keepstep.checkpoint.saving import tracking
from keepstep.checkpoint.saving.tracking import KnownDigests, WriteTracker

ELEMENTS = 600_000


def kernel_can() -> bool:
    try:
        WriteTracker().close()
    except OSError:
        return False
    return True


needs_kernel = pytest.mark.skipif(not kernel_can(), reason="this kernel, or container, tracks no writes")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class Asked:
    """Asks whether a tensor is as it was, and counts how often its bytes were read for the answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = 0
        self.known = KnownDigests()

        def counted(data: memoryview) -> str:
            self.read += 1
            return digest_of(data)

        monkeypatch.setattr(tracking, "digest_of", counted)

    def settle(self, tensor: torch.Tensor) -> str:
        digest = digest_of(bytes_of(tensor))
        for _ in range(4):
            self.known.next_save()
            assert self.known.matches(tensor, bytes_of(tensor), digest)
        return digest

    def proved(self, tensor: torch.Tensor, digest: str) -> bool:
        before = self.read
        self.known.next_save()
        proof = self.known.proves(tensor, digest)
        same = digest == digest_of(bytes_of(tensor))
        assert self.known.matches(tensor, bytes_of(tensor), digest) is same
        assert proof is (same and self.read == before)
        return self.read == before


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    # What earlier tests saved may still be watched where this one's memory lies.
    memory._kept.clear()
    gc.collect()
    return Asked(monkeypatch)


def read_zeros(w: torch.Tensor) -> None:
    with Path("/dev/zero").open("rb", buffering=0) as zeros:
        zeros.readinto(w.numpy()[1000:1010].data)


def give_pages_back(w: torch.Tensor) -> None:
    begin = -(-w.data_ptr() // 4096) * 4096
    assert ctypes.CDLL(None).madvise(ctypes.c_void_p(begin + 40960), 8192, 4) == 0  # MADV_DONTNEED


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda w: w.add_(1),
    "first element": lambda w: w[:1].fill_(7),
    "last element": lambda w: w[-1:].fill_(7),
    "view": lambda w: w.view(600, 1000)[300, 5:6].fill_(7),
    "data": lambda w: w.data[ELEMENTS // 2 :][:1].fill_(7),
    "numpy": lambda w: w.numpy().__setitem__(ELEMENTS // 3, 7),
    "another library": lambda w: ctypes.memset(w.data_ptr() + 800_001, 7, 1),
    "a read of a file": read_zeros,
    "pages given back": give_pages_back,
}


@needs_kernel
def test_what_rests_is_not_read_again(asked: Asked) -> None:
    w = torch.randn(ELEMENTS)
    digest = asked.settle(w)
    for _ in range(3):
        assert asked.proved(w, digest)


@needs_kernel
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen(asked: Asked, write: Callable[[torch.Tensor], Any]) -> None:
    w = torch.randn(ELEMENTS)
    digest = asked.settle(w)
    assert asked.proved(w, digest)
    write(w)
    assert not asked.proved(w, digest)
    assert asked.proved(w, asked.settle(w)), "it rests again and is not proved any more"


@needs_kernel
def test_memory_of_another_tensor_is_not_taken_for_proved(asked: Asked) -> None:
    for _ in range(20):  # the allocator likes to hand out what was just freed
        w = torch.randn(ELEMENTS)
        digest = asked.settle(w)
        del w
        w = torch.empty(ELEMENTS)
        w.fill_(1)
        assert not asked.proved(w, digest)


@needs_kernel
@pytest.mark.parametrize("first_written_is_asked", ["first", "last"])
def test_tensors_that_overlap_prove_nothing_for_one_another(
    asked: Asked, first_written_is_asked: str
) -> None:
    w = torch.randn(3 * ELEMENTS)
    views = [w[: 2 * ELEMENTS], w[ELEMENTS:]]
    if first_written_is_asked == "last":
        views.reverse()
    digests = [digest_of(bytes_of(view)) for view in views]
    for _ in range(4):
        asked.known.next_save()
        assert all(asked.known.matches(v, bytes_of(v), d) for v, d in zip(views, digests, strict=True))
    w[3 * ELEMENTS // 2] = 7  # where both lie
    asked.known.next_save()
    assert not any(asked.known.matches(v, bytes_of(v), d) for v, d in zip(views, digests, strict=True))


@needs_kernel
def test_a_fork_writes_to_memory_of_its_own(asked: Asked) -> None:
    w = torch.randn(ELEMENTS)
    digest = asked.settle(w)
    assert in_fork(w.zero_) == 0
    assert asked.proved(w, digest)
    w[5000] = 1
    assert not asked.proved(w, digest)


@needs_kernel
def test_memory_that_others_may_write_to_is_always_read(asked: Asked, tmp_path: Path) -> None:
    shared = torch.randn(ELEMENTS).share_memory_()
    digest = asked.settle(shared)
    assert not asked.proved(shared, digest)
    (tmp_path / "w").write_bytes(bytes(ELEMENTS * 4))
    mapped = torch.from_file(str(tmp_path / "w"), shared=False, size=ELEMENTS)
    digest = asked.settle(mapped)
    assert not asked.proved(mapped, digest)


def test_without_the_kernel_everything_is_read(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: WriteTracker) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(WriteTracker, "__init__", refuse)
    w = torch.randn(ELEMENTS)
    digest = asked.settle(w)
    assert not asked.proved(w, digest)
    w[3] = 0
    assert not asked.proved(w, digest)


def test_an_unknown_platform_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(OSError, match="not known for this platform"):
        WriteTracker()
