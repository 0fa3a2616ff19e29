"""A machine as a test wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Imagined:
    """Facts for a plan; counts how often it was asked for GPUs, which takes seconds on a real machine."""

    gpu_count: int = 0
    cpus: int = 8
    variables: Mapping[str, str] = field(default_factory=dict)
    busy_ports: tuple[int, ...] = ()
    asked: int = 0

    @property
    def gpus(self) -> int:
        self.asked += 1
        return self.gpu_count

    def is_free(self, port: int) -> bool:
        return port not in self.busy_ports
