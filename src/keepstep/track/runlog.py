"""keepstep's own log of a run: JSON lines, only ever appended, so that no kill makes it unreadable.

What the lines mean is told in docs/tracking.md; `reading.py` reads them.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keepstep.track.values import json_line, split_config, to_json

__all__ = ["LOG_NAME", "RunLog"]

LOG_NAME = "log.jsonl"
_LONGEST_LINE_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class RunLog:
    """Appends lines to `log.jsonl`.

    A line is handed to the system in one write, so it outlives the process at once; the disk is asked to hold
    it when a checkpoint is saved (`sync`). A line that can't be written, on a full disk say, is told of and
    lost: a training does not end for it.

    Args:
        path: of the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._unsynced = False
        self._failing = False

    def row(self, *, run: str, attempt: int, step: int, values: Mapping[str, Any]) -> dict[str, str]:
        """Append what `log()` was given.

        Returns:
            {name: kind of value} of what JSON does not hold; the line says so too.
        """
        plain, left_out = to_json(values)
        more = {"left_out": left_out} if left_out else {}
        self._append("row", run, attempt, step=step, values=plain, **more)
        return left_out

    def started(self, *, run: str) -> None:
        """Append that a run begins: rows so far are another run's."""
        self._append("started", run, 1, log_format=1)

    def project(self, *, run: str, attempt: int, name: str, config: Mapping[str, Any]) -> None:
        """Append what `init_trackers()` was given."""
        plain, left_out = split_config(config)
        more = {"left_out": left_out} if left_out else {}
        self._append("project", run, attempt, project=name, config=to_json(plain)[0], **more)

    def resumed(
        self, *, run: str, attempt: int, rows: int, come_from: Mapping[str, Any] | None, kept_from: int | None
    ) -> None:
        """Append that the run goes on from a checkpoint: rows after its position count no more.

        Args:
            run: the run from now on.
            attempt: of that run.
            rows: how many rows the checkpoint counts.
            come_from: `place` at the time of the checkpoint, if this is the file that it was in.
            kept_from: bytes; rows from there on were logged after the checkpoint was loaded, and count.
        """
        self._append("resumed", run, attempt, rows=rows, come_from=come_from, kept_from=kept_from)

    @property
    def size_bytes(self) -> int:
        """How long the file is now."""
        try:
            return self.path.stat().st_size if self._fd < 0 else os.fstat(self._fd).st_size
        except FileNotFoundError:
            return 0

    def holds(self, run: str, offset: int) -> bool:
        """Whether a line of a run ends at `offset`, as if this is the file that a checkpoint speaks of."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, offset - _LONGEST_LINE_BYTES))
                before = file.read(min(offset, _LONGEST_LINE_BYTES))
            line = json.loads(before.removesuffix(b"\n").rpartition(b"\n")[2])
            return before.endswith(b"\n") and bool(line["run"] == run)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def sync(self) -> None:
        """Ask the disk to hold what was appended; returns at once."""
        if self._unsynced and self._fd >= 0:
            self._unsynced = False
            fd = os.dup(self._fd)
            threading.Thread(target=_sync_and_close, args=(fd,), name="keepstep-log", daemon=True).start()

    def close(self) -> None:
        """Make it durable and close it; it opens again with the next line."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            _sync_and_close(fd)

    def _append(self, kind: str, run: str, attempt: int, **more: Any) -> None:
        line = {"kind": kind, "run": run, "attempt": attempt, "time": round(time.time(), 3), **more}
        data = json_line(line)
        try:
            if self._fd < 0:
                self._fd = _open(self.path)
            written = os.write(self._fd, data)
            if written < len(data):  # so that the rest of a torn line does not spoil the next one
                self.close()
                raise OSError(f"{written} of {len(data)} bytes")
        except OSError as error:
            if not self._failing:
                _log.warning("%s can't be written, and what is logged is lost: %s", self.path, error)
            self._failing = True
            return
        if self._failing:
            _log.warning("%s can be written again", self.path)
        self._failing, self._unsynced = False, True


def _open(path: Path) -> int:
    """Open for appending, on a line of its own: the last one may have been torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")
    except OSError:
        os.close(fd)
        raise
    return fd


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError as error:
        _log.warning("a run's log may not outlive a power cut: %s", error)
    finally:
        os.close(fd)
