"""Memory that is copied into before it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from keepstep.checkpoint.saving.staging import BLOCK_BYTES, Block

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the kernel gives no huge pages"
)
def test_a_block_lies_on_huge_pages() -> None:
    block = Block(BLOCK_BYTES)
    block.array[:] = 1
    (mapping,) = [
        part
        for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part))
        and int(bounds[1], 16) <= block.address < int(bounds[2], 16)
    ]
    # The kernel may be short of them for a moment: one is enough to see that they are asked for.
    in_huge_pages = int(re.search(r"AnonHugePages: +(\d+) kB", mapping)[1])  # type: ignore[index]
    assert in_huge_pages >= 2048
    assert block.address % (2 << 20) == 0
    assert len(block.view) == BLOCK_BYTES
