"""What this process may use of its machine: a container's share, not the whole machine's."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_memory_bytes", "memory_bytes", "usable_cpus"]


def usable_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many CPUs this process may use: by its affinity, and by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for place in _groups(root, own, "cpu") if (quota := _quota(place)) is not None]
    return max(1, min([count, *(int(quota) for quota in quotas)]))


def _groups(root: Path, own: Path, what: str) -> list[Path]:
    """The directories of this process's control group and those above it, of both versions.

    Args:
        root: where control groups are.
        own: what tells this process's.
        what: the controller, "cpu" or "memory".
    """
    places = [root, root / what]
    for line in _read(own).splitlines():
        kinds, _, path = line.partition(":")[2].partition(":")
        base = root if not kinds else root / kinds
        if not kinds or what in kinds.split(","):
            inner = base / path.strip().lstrip("/")
            places += [inner, *(above for above in inner.parents if base in above.parents)]
    return places


def _quota(place: Path) -> float | None:
    """CPUs that a control group grants; None: any number."""
    said = _read(place / "cpu.max").split() or [
        _read(place / "cpu.cfs_quota_us").strip(),
        _read(place / "cpu.cfs_period_us").strip(),
    ]
    if len(said) != 2 or not said[0].isdecimal() or not said[1].isdecimal() or int(said[1]) == 0:
        return None
    return int(said[0]) / int(said[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def memory_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How much memory this process may use: what there is, or the limit of its control group."""
    return min([_memory_there(), *(limit for _, limit in _limits(root, own))])


def free_memory_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How much of it the control groups have left, whatever the machine has; what files take can be had."""
    left = [limit - _in_use(place) for place, limit in _limits(root, own)]
    return max(0, min([_memory_there(), *left]))


def _memory_there() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _limits(root: Path, own: Path) -> list[tuple[Path, int]]:
    """The limits of memory, each with the directory of its group."""
    said = [
        (place, _read(place / name).strip())
        for place in _groups(root, own, "memory")
        for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return [(place, int(limit)) for place, limit in said if limit.isdecimal()]


def _in_use(place: Path) -> int:
    """Bytes that a control group and those below it hold, but for files that were not read again."""
    said = (_read(place / "memory.current") or _read(place / "memory.usage_in_bytes")).strip()
    if not said.isdecimal():
        return 0
    of_kind = dict(line.split()[:2] for line in _read(place / "memory.stat").splitlines() if " " in line)
    files = of_kind.get("total_inactive_file") or of_kind.get("inactive_file") or "0"
    return max(0, int(said) - int(files))
