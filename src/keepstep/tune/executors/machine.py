"""What this machine has: CPUs that may be used, GPUs, memory. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

__all__ = ["gpu_names", "machine_total", "usable_cpus"]

_GPU_DEVICES: Final = re.compile(r"nvidia\d+")
_GPU_LINE: Final = re.compile(r"GPU (\d+):")
_MIG_LINE: Final = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")


def machine_total(visible: str | None) -> tuple[dict[str, float], tuple[str, ...]]:
    """What trials may hold in all, and what each GPU is called.

    Args:
        visible: what CUDA_VISIBLE_DEVICES says; None: it isn't set.

    Returns:
        {"cpu": how many, "memory": bytes} and "gpu" if there are any; their names.
    """
    gpus = gpu_names(visible)
    total: dict[str, float] = {"cpu": float(usable_cpus()), "memory": float(_memory_bytes())}
    if gpus:
        total["gpu"] = float(len(gpus))
    return total, gpus


def usable_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """How many CPUs this process may use: by its affinity, and by the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for place in _groups(root, own) if (quota := _quota(place)) is not None]
    return max(1, min([count, *(int(quota) for quota in quotas)]))


def _groups(root: Path, own: Path) -> list[Path]:
    """The directories of this process's control group and those above it, of both versions."""
    places = [root, root / "cpu"]
    for line in _read(own).splitlines():
        kinds, _, path = line.partition(":")[2].partition(":")
        base = root if not kinds else root / kinds
        if not kinds or "cpu" in kinds.split(","):
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


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpu_names(visible: str | None, devices: Path = Path("/dev")) -> tuple[str, ...]:
    """What each GPU that may be used is called in CUDA_VISIBLE_DEVICES.

    Args:
        visible: what that says now; None: it isn't set.
        devices: where the kernel shows them.
    """
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return tuple(name for name in names if name and name not in ("-1", "NoDevFiles"))
    try:
        shown = sum(bool(_GPU_DEVICES.fullmatch(name)) for name in os.listdir(devices))
    except OSError:
        shown = 0
    if not shown:
        return ()
    return parse_gpu_list(_nvidia_smi()) or tuple(str(number) for number in range(shown))


def _nvidia_smi() -> str:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_gpu_list(text: str) -> tuple[str, ...]:
    """The GPUs that `nvidia-smi -L` lists; of one that is divided (MIG), its parts."""
    found: list[str] = []
    number: str | None = None
    parts: list[str] = []
    for line in [*text.splitlines(), "GPU end:"]:
        if part := _MIG_LINE.match(line):
            parts.append(part[1])
        elif line.startswith("GPU "):
            if number is not None:
                found += parts or [number]
            entry = _GPU_LINE.match(line)
            number, parts = (entry[1] if entry else None), []
    return tuple(found)
