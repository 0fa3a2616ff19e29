"""Files of trials whose storage is a bucket: uploaded in the background, now and then and at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from keepstep.errors import KeepstepError
from keepstep.tune.logger.encoding import encoded

if TYPE_CHECKING:
    from keepstep.checkpoint.place.bucket import ObjectsLike

__all__ = ["Uploads"]

_log = logging.getLogger(__name__)
_THREADS: Final = 8


class Uploads:
    """Uploads files that changed.

    Args:
        objects: of the experiment.
        root: the directory that stands in for it.
        every_s: seconds between two uploads of a trial that runs.
    """

    def __init__(self, objects: ObjectsLike, root: Path, every_s: float) -> None:
        self._objects = objects
        self._root = root
        self._every_s = every_s
        self._lock = threading.Lock()
        self._changed: dict[str, set[str]] = {}
        self._uploaded_at: dict[str, float] = {}
        self._running: dict[str, Future[None]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._complained = False
        self._sizes: dict[str, int] | None = None

    def are_there(self, dirname: str, texts: Mapping[str, str]) -> bool:
        """Whether the bucket has these files of a trial, as far as their sizes tell; it is looked at once."""
        if self._sizes is None:
            self._sizes = {found.key: found.bytes for found in self._objects.list()}
        return all(
            self._sizes.get(f"{dirname}/{name}", 0) == len(encoded(text)) for name, text in texts.items()
        )

    def changed(self, dirname: str, name: str) -> None:
        """A file of a trial is another one now."""
        with self._lock:
            self._changed.setdefault(dirname, set()).add(name)
        self._uploaded_at.setdefault(dirname, time.monotonic())

    def start_due(self) -> None:
        """Begin with the files of every trial whose time has come."""
        now = time.monotonic()
        with self._lock:
            due = [name for name in self._changed if now - self._uploaded_at[name] >= self._every_s]
        for dirname in due:
            self.start(dirname)

    def start(self, dirname: str) -> None:
        """Begin with what changed of one trial."""
        self._running = {name: future for name, future in self._running.items() if not future.done()}
        if dirname in self._running:
            return  # what changed meanwhile is due later
        self._uploaded_at[dirname] = time.monotonic()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="keepstep-upload")
        self._running[dirname] = self._threads.submit(self._upload, dirname)

    def _upload(self, dirname: str) -> None:
        with self._lock:
            names = self._changed.pop(dirname, set())
        for name in sorted(names):
            try:
                self._objects.put(f"{dirname}/{name}", (self._root / dirname / name).read_bytes())
            except (KeepstepError, OSError) as error:
                with self._lock:
                    self._changed.setdefault(dirname, set()).add(name)
                if not self._complained:
                    self._complained = True
                    _log.warning(
                        "%s/%s/%s can't be uploaded (%s); it is tried again while the experiment runs",
                        self._objects.address,
                        dirname,
                        name,
                        error,
                    )

    def close(self) -> None:
        """Upload what is left, and wait for it."""
        if self._threads is None and not self._changed:
            return
        for future in self._running.values():
            future.result()
        with self._lock:
            left = list(self._changed)
        for dirname in left:
            self.start(dirname)
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None
        if self._changed:
            _log.error(
                "the files of %d trial(s) could not be uploaded to %s; they are made anew from the journal "
                "when the experiment is restored",
                len(self._changed),
                self._objects.address,
            )
