"""What this machine has for trials. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

from keepstep.control_groups import memory_bytes, usable_cpus

__all__ = ["gpu_names", "machine_total"]

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
    total: dict[str, float] = {"cpu": float(usable_cpus()), "memory": float(memory_bytes())}
    if gpus:
        total["gpu"] = float(len(gpus))
    return total, gpus


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
