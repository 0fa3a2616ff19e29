"""Checkpoints that are larger than the memory, or lie in more files than a process may open."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from keepstep import Store
from keepstep.checkpoint.format.manifest import FileEntry
from keepstep.checkpoint.format.source import source_of
from keepstep.errors import DigestError


@pytest.mark.skipif(
    not Path("/proc/sys/vm/overcommit_memory").exists()
    or Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "0",
    reason="the system does not count mappings, or counts all of them",
)
def test_a_segment_larger_than_the_memory_is_mapped_and_a_write_stays_private(tmp_path: Path) -> None:
    sizes = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    size = (int(sizes["MemTotal:"]) + int(sizes["SwapTotal:"])) * 1024 + (1 << 30)
    with (tmp_path / "large.safetensors").open("wb") as file:
        file.truncate(size)  # a hole
    opened = source_of(tmp_path).open("large.safetensors", FileEntry(bytes=size, digest=""))
    mapped = opened.map()
    opened.close()
    assert mapped is not None
    mapped[5] = 7
    assert (mapped[5], len(mapped)) == (7, size)
    mapped.close()
    with (tmp_path / "large.safetensors").open("rb") as file:
        assert file.read(8) == bytes(8)


@contextlib.contextmanager
def may_open(more: int) -> Iterator[None]:
    """So many files beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="who knows what is open")
def test_more_segments_than_may_be_open_are_loaded_and_verified(tmp_path: Path) -> None:
    state = {f"part_{number}": {"w": torch.full((2,), float(number))} for number in range(600)}
    saved = Store(tmp_path).save(state)
    live = {name: {"w": torch.zeros(2)} for name in state}
    with may_open(300):
        loaded = saved.load()
        saved.load_into(live)
    for name, part in state.items():
        assert torch.equal(loaded[name]["w"], part["w"])
        assert torch.equal(live[name]["w"], part["w"])
    last = saved.path / "part_99.safetensors"  # of the last group
    data = bytearray(last.read_bytes())
    data[10] ^= 1
    last.write_bytes(bytes(data))
    untouched = {name: {"w": torch.zeros(2)} for name in state}
    with may_open(300), pytest.raises(DigestError, match=r"header of part_99"):
        saved.load_into(untouched)
    assert not any(part["w"].any() for part in untouched.values()), "headers come first"
