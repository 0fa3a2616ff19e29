"""Facts about this machine, looked up when they are asked for."""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final

from keepstep.control_groups import usable_cpus
from keepstep.launch.environment import variables

__all__ = ["ThisMachine"]

_DEVICES: Final = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "kfd", "dxg")
"""What Linux shows where CUDA or ROCm could work: on servers, on Tegra, AMD's, and within Windows."""


class ThisMachine:
    """What a launch asks of the machine that it runs on; see `keepstep.launch.plan.Machine`."""

    @functools.cached_property
    def gpus(self) -> int:
        """Asks PyTorch, which takes seconds to import, if a driver is there; no device is initialized."""
        if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _DEVICES):
            return 0
        count: int = import_module("torch").cuda.device_count()
        return count

    @property
    def cpus(self) -> int:
        return usable_cpus()

    @property
    def variables(self) -> Mapping[str, str]:
        return variables()

    def is_free(self, port: int) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                return False
        return True
