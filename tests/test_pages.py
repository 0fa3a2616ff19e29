"""Memory for direct writes."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from keepstep.pages import huge_pages

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the kernel gives no huge pages"
)
def test_memory_for_direct_writes_lies_on_huge_pages() -> None:
    memory = huge_pages(8 << 20)
    assert memory.tobytes() == bytes(8 << 20)
    memory[:] = b"\x01" * len(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    (mapping,) = [
        part
        for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", part))
        and int(bounds[1], 16) <= address < int(bounds[2], 16)
    ]
    # The kernel may be short of them for a moment: one is enough to see that they are asked for.
    in_huge_pages = int(re.search(r"AnonHugePages: +(\d+) kB", mapping)[1])  # type: ignore[index]
    assert in_huge_pages >= 2048
    assert address % (2 << 20) == 0
