"""Who reserved a number or writes to a bucket, and whether that process is known to be dead."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Claimant", "parse_claim", "this_process"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claimant:
    """A process, so that it can be told from a later one of the same number.

    Attributes:
        host: its name.
        boot: changes when the host starts anew; "" if unknown.
        pid: its number.
        started: when it began, in the kernel's ticks; 0 if unknown.
        namespace: that its number is of, as containers have their own; 0 if unknown.
        at: when it claimed, ISO 8601, UTC; "" if unknown. For people: it tells no two processes apart.
    """

    host: str
    boot: str
    pid: int
    started: int
    namespace: int = 0
    at: str = field(default="", compare=False)

    def __str__(self) -> str:
        since = f", since {self.at[:19].replace('T', ' ')} UTC" if self.at else ""
        return f"process {self.pid} on {self.host}{since}"

    @property
    def is_here(self) -> bool:
        """Whether it is this process."""
        return self == this_process()

    @property
    def is_dead(self) -> bool:
        """Whether it is known to be gone; a process of another host or container never is."""
        if self.host != socket.gethostname():
            return False
        return self.boot != _boot() or (self.namespace == _namespace() and not self.lives_here)

    @property
    def lives_here(self) -> bool:
        """Whether it is a living process of this host, as far as its processes can be seen from here."""
        if (self.host, self.boot, self.namespace) != (socket.gethostname(), _boot(), _namespace()):
            return False
        return _started(self.pid) == self.started

    def dump(self, **more: object) -> bytes:
        """As JSON, with further members."""
        return json.dumps({**asdict(self), **more}).encode()


def this_process() -> Claimant:
    """The process that asks."""
    return Claimant(
        host=socket.gethostname(),
        boot=_boot(),
        pid=os.getpid(),
        started=_started(os.getpid()) or 0,
        namespace=_namespace(),
        at=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def parse_claim(data: bytes) -> tuple[Claimant | None, dict[str, Any]]:
    """A claim as it was dumped: who, and everything it says; (None, {}) for what is none."""
    try:
        said = json.loads(data)
        who = Claimant(
            host=str(said["host"]),
            boot=str(said["boot"]),
            pid=int(said["pid"]),
            started=int(said["started"]),
            namespace=int(said.get("namespace", 0)),
            at=str(said.get("at", "")),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, {}
    return who, said


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> int:
    """Two containers may have the host's name and each a process 7: only their namespaces differ."""
    with contextlib.suppress(OSError):
        return Path("/proc/self/ns/pid").stat().st_ino
    return 0


def _started(pid: int) -> int | None:
    """When a process began; 0 if this system can't say, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if not Path("/proc/self/stat").exists():
            return 0 if _signalled(pid) else None
        return None
    except OSError:
        return 0
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _signalled(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
