"""A copy of a store in a bucket, uploaded behind the training.

What is to be uploaded is first linked into `.keepstep/uploads/`: pruning can't take it, and after a kill the
next process finds it there.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.pruning import prune
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.place.backend import INTERNAL_NAME
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.unmirrored import HOPELESS, LASTING, is_damage_here, told
from keepstep.checkpoint.uploading import upload_checkpoint
from keepstep.checkpoint.uploads import lacking, left_over, link_if_there, link_upload
from keepstep.checkpoint.waiting import Upload, Waiting
from keepstep.errors import DirectoryNotOursError, KeepstepError, MirrorError, StoreError
from keepstep.files import Files
from keepstep.outcome import LOOK_UP_S, Bell

__all__ = ["Mirror", "MirrorProgress"]

_LOG_EVERY_S: Final = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorProgress:
    """How far a mirror is.

    Attributes:
        uploading: the checkpoint under way, or None.
        bytes_done: of it, those that need no upload included.
        bytes_total: of it.
        pending: checkpoints that wait, those that failed included.
        mirrored: checkpoints uploaded by this process.
        skipped: checkpoints that newer ones overtook.
        failed: attempts that failed.
    """

    uploading: str | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    pending: int = 0
    mirrored: int = 0
    skipped: int = 0
    failed: int = 0


class Mirror:
    """Uploads the committed checkpoints of a directory, one at a time, the oldest first.

    Args:
        root: the directory of the store.
        bucket: where the copies go.
        files: how the disk is changed.
        retention: what the mirror keeps.
        most_pending: checkpoints that may wait (`Waiting`); those that are overtaken are skipped.
        reached: is told the next number of the mirror each time that it was found in reach.
        damaged: is called when what was to be uploaded turns out to be damaged here.
    """

    def __init__(
        self,
        root: Path,
        bucket: BucketBackend,
        *,
        files: Files,
        retention: Retention,
        most_pending: int = 2,
        reached: Callable[[int], None],
        damaged: Callable[[], None],
    ) -> None:
        self.bucket = bucket
        self._root = root
        self._uploads = root / INTERNAL_NAME / "uploads"
        self._files = files
        self._retention = retention
        self._reached, self._damaged = reached, damaged
        self._pid = os.getpid()
        self._runs: set[str] = set()
        self._linking = threading.RLock()  # the handler of a signal may save as well
        self._lock = threading.RLock()
        self._changed = Bell()
        self._waiting = Waiting(most_pending)
        self._running: Upload | None = None
        self._error: Exception | None = None
        self._behind = True
        self._unread = self._catching_up = False
        self._passed_over: set[str] = set()
        self._stopping = self._draining = self._drains_at_exit = False
        self._progress = MirrorProgress()
        self._thread: threading.Thread | None = None
        self._logged_at_s = 0.0

    def __repr__(self) -> str:
        return f"<Mirror {self.bucket} {self.progress}>"

    @property
    def progress(self) -> MirrorProgress:
        """How far it is."""
        with self._lock:
            return replace(self._progress, pending=len(self._waiting))

    @property
    def started(self) -> bool:
        """Whether its thread runs, and is not about to end."""
        return self._thread is not None and not self._stopping

    # ----------------------------------------------------------------------------------- the queue

    def start(self) -> None:
        """Take up what an earlier process left, and what the mirror lacks, at the first start."""
        with self._lock:
            self._stopping = False
            if self._thread is None:
                self._catching_up = self._behind
                self._thread = threading.Thread(target=self._work, name="keepstep-mirror", daemon=True)
                self._thread.start()
            if self._drains_at_exit:
                return
            self._drains_at_exit = True
        mirror = weakref.ref(self)

        def drain() -> None:
            if (alive := mirror()) is not None:
                alive.drain()

        atexit.register(drain)

    def stop(self) -> None:
        """Have the thread end once nothing is left that could be uploaded; `start` starts it again."""
        if self._pid == os.getpid():  # a forked child has no thread, and the lock may be held for ever
            with self._lock:
                self._stopping = True
                self._changed.ring()

    def offer(self, directory: Path, manifest: Manifest) -> None:
        """Have a committed checkpoint uploaded. Never raises: the checkpoint itself is safe."""
        with self._linking:
            try:
                linked = link_upload(self._files, self._uploads, directory, manifest)
            except (OSError, KeepstepError) as error:
                log.error("%s could not be linked for the mirror: %s", directory, error)
                with self._lock:
                    self._note(error)
                    self._behind = True  # the next upload that succeeds is followed by what is lacking
                return
            with self._lock:
                self._behind = self._behind or self._unread  # it may be readable by now
                self._waiting.try_again()
                self._add(Upload(linked, manifest, directory.name))

    def _add(self, job: Upload) -> None:
        for late in self._waiting.add(job):
            self._progress = replace(self._progress, skipped=self._progress.skipped + 1)
            log.warning("%s is not mirrored to %s: newer ones overtook it", late.name, self.bucket)
            self._pass_over(late)
        self._changed.ring()

    def _pass_over(self, job: Upload) -> None:
        """It is not mirrored by this process: whoever catches up leaves it out."""
        self._passed_over.add(job.manifest.id)
        self._forget(job)

    def _forget(self, job: Upload) -> None:
        try:
            self._files.remove_tree(job.directory)
        except OSError as error:
            log.warning("could not remove %s (%s)", job.directory, error)

    def wait(self, on_error: Literal["raise", "warn"] = "raise") -> None:
        """Wait until every checkpoint is mirrored, or has failed to be.

        Raises:
            MirrorError: one could not be uploaded; the cause is chained. It is tried again after the next
                save, or by the next process, unless that can't help: the message says so. With
                `on_error="warn"` this is a warning.
        """
        while True:
            with self._lock:
                if self._thread is None or not (self._is_busy or self._waiting.to_try):
                    error, self._error = self._error, None
                    break
                changed = self._changed.next_ring
            changed.wait(LOOK_UP_S)
        if error is None:
            return
        said = told(error, str(self.bucket), self._root)
        if on_error == "raise":
            raise said from error
        warnings.warn(str(said), stacklevel=2)

    @property
    def _is_busy(self) -> bool:
        return self._running is not None or self._catching_up

    def drain(self) -> None:
        """At the end of the process: wait, and log what fails. After a failure nothing more is tried."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._draining = True
            left = self._waiting.to_try + (self._running is not None)
        if left:
            log.warning("waiting for the upload of %d checkpoint(s) to %s", left, self.bucket)
        elif self._catching_up:
            log.warning("waiting until it is known what the mirror %s lacks", self.bucket)
        try:
            self.wait()
        except MirrorError as error:
            log.critical("keepstep: %s", error)
        except KeyboardInterrupt:
            log.critical("%s is behind; the next process that writes to %s goes on", self.bucket, self._root)

    # ----------------------------------------------------------------------------------- uploading

    def _work(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                self._settle(job, self._try(job))
        except BaseException as error:  # nobody may wait for a thread that is gone
            log.critical("the mirror %s stopped", self.bucket, exc_info=True)
            with self._lock:
                self._error = MirrorError(f"the thread of the mirror {self.bucket} ended: {error!r}")
                self._running, self._thread, self._catching_up = None, None, False
                self._behind = True  # what was under way is still linked
                self._changed.ring()

    def _next_job(self) -> Upload | None:
        """Wait for one; None once `stop` was called and none is left."""
        if self._catching_up and not self._draining:  # not after a failure, which it may lead to again
            self._catch_up()
        with self._lock:
            self._catching_up = False
            self._changed.ring()
        while True:
            with self._lock:
                job = self._waiting.take_next()
                if job is not None:
                    return self._begin(job)
                if self._stopping:
                    self._thread = None
                    return None
                changed = self._changed.next_ring
            changed.wait(LOOK_UP_S)

    def _begin(self, job: Upload) -> Upload:
        self._running = job
        total = job.manifest.bytes
        self._progress = replace(self._progress, uploading=job.name, bytes_done=0, bytes_total=total)
        return job

    def _settle(self, job: Upload, error: Exception | None) -> None:
        with self._lock:
            self._running = None
            job.failed = error is not None
            if error is None:
                self._catching_up = self._behind and not self._draining
                self._forgive()
            else:
                self._note(error)
                self._give_up_at_the_end()
                if not isinstance(error, DirectoryNotOursError):
                    self._waiting.put_back(job)
            self._progress = replace(
                self._progress,
                uploading=None,
                mirrored=self._progress.mirrored + (error is None),
                failed=self._progress.failed + (error is not None),
            )
            self._changed.ring()

    def _note(self, error: Exception) -> None:
        if not isinstance(self._error, LASTING):
            self._error = error

    def _give_up_at_the_end(self) -> None:
        if self._draining:
            self._waiting.give_up()

    def _forgive(self) -> None:
        """Forget an error once all that failed has been done after all."""
        if not (self._behind or self._unread or self._waiting.any_failed or isinstance(self._error, LASTING)):
            self._error = None

    def _catch_up(self) -> None:
        """What was linked by a process that died, and what was committed without being linked."""
        try:
            mirrored = [entry for entry in catalog.scan(self.bucket) if entry.manifest]
            self._reached(self.bucket.next_number())
            with self._linking:
                unread = [
                    *self._take_up({entry.manifest.id for entry in mirrored if entry.manifest}),
                    *self._link_missing(mirrored),
                ]
                with self._lock:
                    self._behind, self._unread = False, bool(unread)
                    for refused in unread:
                        self._note(refused)
                    self._forgive()
        except (OSError, KeepstepError) as error:
            log.error("the mirror %s could not be brought up to date: %s", self.bucket, error)
            with self._lock:
                self._note(error)
                self._give_up_at_the_end()
                self._changed.ring()

    def _take_up(self, mirrored: set[str]) -> Sequence[StoreError]:
        """What an earlier process linked; why some of it can't be read."""
        found, unread = left_over(self._files, self._uploads)
        for directory, manifest in found:
            self._offer_missing(directory, manifest, directory.name.partition(".")[0], mirrored)
        return unread

    def _link_missing(self, mirrored: Sequence[catalog.Entry]) -> Sequence[StoreError]:
        """What is only here, and would stay in the mirror; why some of it can't be read."""
        found = lacking(self._root, mirrored, self._retention)
        ids = {entry.manifest.id for entry in mirrored if entry.manifest}
        for entry in found.entries:
            if entry.manifest is None or entry.manifest.id in self._passed_over:
                continue
            linked = link_if_there(self._files, self._uploads, entry)
            if linked is not None:
                self._offer_missing(linked, entry.manifest, entry.name, ids)
        if found.taken:
            log.error(
                "%s holds other checkpoints under the names %s: these are not mirrored. Numbers that it has "
                "are not given again from now on",
                self.bucket,
                ", ".join(found.taken),
            )
        return found.unread

    def _offer_missing(self, directory: Path, manifest: Manifest, name: str, mirrored: set[str]) -> None:
        job = Upload(directory, manifest, name)
        with self._lock:
            running = self._running is not None and self._running.manifest.id == manifest.id
            if running or self._waiting.has(manifest.id):
                return
            if manifest.id not in mirrored:
                self._add(job)
                return
        self._forget(job)

    def _try(self, job: Upload) -> Exception | None:
        try:
            upload_checkpoint(self.bucket, job.directory, job.name, job.manifest, self._advance)
        except Exception as error:  # noqa: BLE001  (the thread goes on)
            log.error("%s was not mirrored to %s: %s", job.name, self.bucket, error)
            job.hopeless = isinstance(error, HOPELESS)
            if is_damage_here(error):
                self._damaged()
            if isinstance(error, DirectoryNotOursError):
                self._pass_over(job)
            return error
        log.info("%s is mirrored to %s", job.name, self.bucket)
        self._forget(job)
        self._runs.add(job.manifest.run)
        self._prune()
        return None

    def _prune(self) -> None:
        """By the rules of the mirror; what another run has put there is never deleted."""
        if self._retention.keeps_all:
            return
        try:
            here = {entry.manifest.run for entry in catalog.scan(self._root) if entry.manifest}
            runs = self._runs | here
            prune(self.bucket, self._retention, of=lambda manifest: manifest.run in runs)
        except Exception as error:  # noqa: BLE001  (the thread goes on)
            log.warning("old checkpoints of the mirror %s could not be deleted: %s", self.bucket, error)

    def _advance(self, count: int) -> None:
        now_s = time.monotonic()
        with self._lock:
            done = self._progress.bytes_done + count
            self._progress = progress = replace(self._progress, bytes_done=done)
        if now_s - self._logged_at_s >= _LOG_EVERY_S:
            self._logged_at_s = now_s
            log.info("mirroring %s: %d of %d MiB", progress.uploading, done >> 20, progress.bytes_total >> 20)
