"""What a control group has left, not what it may use in all."""

from __future__ import annotations

from pathlib import Path

import pytest

from keepstep.control_groups import free_memory_bytes, memory_bytes
from keepstep.models import sizes


def group(place: Path, **files: object) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, said in files.items():
        (place / name.replace("_", ".", 1)).write_text(f"{said}\n")


def test_what_a_container_holds_is_not_free_but_the_files_that_it_read_are(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    outer = tmp_path / "fs" / "outer"
    group(outer, memory_max=32 << 20, memory_current=20 << 20)
    group(outer / "inner", memory_max="max", memory_current=19 << 20)
    assert memory_bytes(tmp_path / "fs", own) == 32 << 20
    assert free_memory_bytes(tmp_path / "fs", own) == 12 << 20
    group(outer, memory_stat=f"anon 5\ninactive_file {3 << 20}\nactive_file 7")
    assert free_memory_bytes(tmp_path / "fs", own) == 15 << 20
    group(outer / "inner", memory_max=24 << 20)  # and 19 of them taken
    assert free_memory_bytes(tmp_path / "fs", own) == 5 << 20
    group(outer / "inner", memory_current=25 << 20)  # the limit was lowered while it ran
    assert free_memory_bytes(tmp_path / "fs", own) == 0


def test_so_it_is_with_control_groups_of_the_first_version(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("5:memory:/job\n")
    stat = f"inactive_file 1\ntotal_inactive_file {4 << 20}"
    group(
        tmp_path / "fs" / "memory" / "job",
        memory_limit_in_bytes=32 << 20,
        memory_usage_in_bytes=20 << 20,
        memory_stat=stat,
    )
    assert free_memory_bytes(tmp_path / "fs", own) == 16 << 20


def test_a_model_gets_what_the_container_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "free_memory_bytes", lambda: 5 << 20)
    found = sizes.get_max_memory()
    assert found.get("cpu", found.get("mps")) == 5 << 20
