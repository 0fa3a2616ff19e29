"""The configuration that needs no questions: every GPU of this machine, else the CPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from keepstep.errors import UsageError
from keepstep.launch.environment import default_config_file
from keepstep.launch.machine import ThisMachine
from keepstep.launch.settings import Settings, settings_of, write_settings

__all__ = ["basic_settings", "write_basic_config"]


def write_basic_config(
    mixed_precision: str = "no", save_location: str | os.PathLike[str] | None = None, use_xpu: bool = False
) -> Path | Literal[False]:
    """Write the configuration that `keepstep launch` reads by default, for this machine; overwrite none.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        save_location: the file, YAML or (`*.json`) JSON; None for the default one.
        use_xpu: XPUs are not supported.

    Returns:
        the file, or False if there is one already.

    Raises:
        UsageError: a value that is not allowed.
    """
    if use_xpu:
        raise UsageError("use_xpu is True; keepstep trains on CPUs and CUDA GPUs. Leave it out.")
    path = Path(save_location) if save_location else default_config_file()
    settings = basic_settings(mixed_precision)
    if path.exists():
        sys.stdout.write(f"There is a configuration at {path} already; it was left as it is.\n")
        return False
    write_settings(settings, path)
    return path


def basic_settings(mixed_precision: str) -> Settings:
    """Settings for all of this machine.

    Raises:
        UsageError: a precision that is not allowed.
    """
    gpus = ThisMachine().gpus
    return settings_of(
        {
            "distributed_type": "MULTI_GPU" if gpus > 1 else "NO",
            "num_processes": max(gpus, 1),
            "use_cpu": gpus == 0,
            "mixed_precision": mixed_precision,
        },
        "write_basic_config",
    )
