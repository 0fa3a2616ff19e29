"""What a container grants, as its control groups tell it."""

from __future__ import annotations

from pathlib import Path

from keepstep.control_groups import memory_bytes, usable_cpus


def test_cpus_are_bounded_by_the_quota_of_the_control_group_and_of_those_above(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    inner = tmp_path / "fs" / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    free = usable_cpus(tmp_path / "fs", own)
    assert free >= 1
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert usable_cpus(tmp_path / "fs", own) == 1
    old = tmp_path / "v1"
    (old / "cpu").mkdir(parents=True)
    (old / "cpu" / "cpu.cfs_quota_us").write_text("50000")
    (old / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert usable_cpus(old, own) == 1  # half a CPU is one


def test_memory_is_bounded_by_the_limits_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n5:memory:/job\n")
    inner, old = tmp_path / "fs" / "outer" / "inner", tmp_path / "fs" / "memory" / "job"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    there = memory_bytes(tmp_path / "fs", own)
    assert there > 1 << 28
    (inner.parent / "memory.max").write_text(f"{1 << 27}\n")
    assert memory_bytes(tmp_path / "fs", own) == 1 << 27
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(f"{1 << 26}\n")
    assert memory_bytes(tmp_path / "fs", own) == 1 << 26
