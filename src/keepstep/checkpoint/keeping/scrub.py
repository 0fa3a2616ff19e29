"""Older checkpoints are read again in the background, so that a fallback is sound when it is needed.

Disks lose bits. Off unless asked for; nothing is remembered on disk.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from keepstep.checkpoint.format.source import Place, place_exists
from keepstep.checkpoint.keeping.catalog import Entry, Root, scan
from keepstep.checkpoint.keeping.verify import FileState, Report, verify_checkpoint
from keepstep.errors import KeepstepError
from keepstep.files import yield_to_others
from keepstep.outcome import LOOK_UP_S, Latch

__all__ = ["SCRUB_BYTES_PER_S", "Scrubber", "next_to_scrub"]

SCRUB_BYTES_PER_S = 50e6
_LONGEST_PAUSE_S = 60.0

log = logging.getLogger(__name__)


def next_to_scrub(
    entries: Sequence[Entry], verified_s: Mapping[str, float], *, now_s: float, interval_s: float
) -> Entry | None:
    """The checkpoint whose turn it is: verified longest ago, and that at least `interval_s` ago.

    Those never verified come first, the newest of them first, as a fallback would take it first. The very
    newest is left out: it was written just now.

    Args:
        entries: oldest first.
        verified_s: by id of the checkpoint.
        now_s: on the same clock.
        interval_s: from one turn of a checkpoint to its next.
    """
    due = [
        (verified_s.get(entry.manifest.id, -float("inf")), -entry.number, entry)
        for entry in entries[:-1]
        if entry.manifest is not None
        and now_s - verified_s.get(entry.manifest.id, -float("inf")) >= interval_s
    ]
    return min(due, key=lambda item: item[:2])[2] if due else None


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    pass


class Scrubber:
    """One thread of lowest priority that verifies a store's older checkpoints, over and over.

    Args:
        root: of the store.
        interval_s: from one turn of a checkpoint to its next, in seconds.
        bytes_per_s: how fast to read at most.
        found: told of each damaged checkpoint, on the thread.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        root: Root,
        *,
        interval_s: float,
        bytes_per_s: float,
        found: Callable[[Place, Report], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._interval_s = interval_s
        self._bytes_per_s = bytes_per_s
        self._found = found
        self._clock = clock
        self._verified_s: dict[str, float] = {}
        self._files_s: dict[FileState, float] = {}
        self._stop = Latch()
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="keepstep-scrub", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End within the time that one read of a few MiB takes. A forked child has nothing to stop."""
        if self._pid == os.getpid():
            self._stop.open()
            while self._thread.is_alive() and threading.current_thread() is not self._thread:
                self._thread.join(LOOK_UP_S)  # a signal may not wake us

    def _run(self) -> None:
        yield_to_others()
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            try:
                pause_s = 0.0 if self.turn() else min(self._interval_s / 10, _LONGEST_PAUSE_S)
            except _Stopped:
                return
            except (OSError, KeepstepError) as error:
                log.warning("the scrub of %s could not go on: %s", self._root, error)
                pause_s = _LONGEST_PAUSE_S

    def turn(self) -> bool:
        """Verify the checkpoint whose turn it is; False if it is nobody's."""
        now_s, entries = self._clock(), scan(self._root)
        ids = {entry.manifest.id for entry in entries if entry.manifest is not None}
        self._verified_s = {id_: at_s for id_, at_s in self._verified_s.items() if id_ in ids}
        self._files_s = {
            file: at_s for file, at_s in self._files_s.items() if now_s - at_s < self._interval_s
        }
        entry = next_to_scrub(entries, self._verified_s, now_s=now_s, interval_s=self._interval_s)
        if entry is None or entry.manifest is None:
            return False
        known = set(self._files_s)
        report = verify_checkpoint(entry.path, progress=self._slowly, known=known)
        self._verified_s[entry.manifest.id] = now_s
        self._files_s.update(dict.fromkeys(known - self._files_s.keys(), now_s))
        if report.refused:
            log.warning("the scrub could not read %s: %s", entry.path, "; ".join(report.problems))
        elif not report.sound and place_exists(entry.path):  # else it was deleted meanwhile
            self._found(entry.path, report)
        return True

    def _slowly(self, read_bytes: int) -> None:
        if self._stop.wait(read_bytes / self._bytes_per_s):
            raise _Stopped
