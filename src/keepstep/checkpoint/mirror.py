"""A copy of a store in a bucket, uploaded behind the training, and pulled when a machine has nothing newer.

What is to be uploaded is first linked into `.keepstep/uploads/`: pruning can't take it, and after a kill the
next process finds it there.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import mmap
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from keepstep.checkpoint.format.manifest import MANIFEST_NAME, FileEntry, Manifest, dump_manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import source_of
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.pruning import prune
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.keeping.verify import verify_checkpoint
from keepstep.checkpoint.place.backend import INTERNAL_NAME
from keepstep.checkpoint.place.bucket import BucketBackend
from keepstep.checkpoint.place.bucket_writing import BucketWorkspace
from keepstep.checkpoint.place.local import LocalWorkspace
from keepstep.errors import DamagedCheckpointError, KeepstepError, MirrorError, StoreError
from keepstep.files import Files

__all__ = ["Mirror", "MirrorProgress", "pull_newest"]

_LOG_EVERY_S: Final = 10.0
_BLOCK_BYTES: Final = 8 << 20

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


@dataclass(eq=False, slots=True)
class _Job:
    directory: Path
    manifest: Manifest
    name: str
    failed: bool = False

    @property
    def number(self) -> int:
        return int(self.name.rpartition("_")[2])

    @property
    def must_go(self) -> bool:
        return bool(self.manifest.pinned or self.manifest.tags)


class Mirror:
    """Uploads the committed checkpoints of a directory, one at a time, the oldest first.

    Args:
        root: the directory of the store.
        bucket: where the copies go.
        files: how the disk is changed.
        retention: what the mirror keeps.
        most_pending: checkpoints that may wait. If more do, the oldest that are neither tagged nor pinned are
            skipped; the newest never is.
    """

    def __init__(
        self, root: Path, bucket: BucketBackend, *, files: Files, retention: Retention, most_pending: int = 2
    ) -> None:
        self.bucket = bucket
        self._root = root
        self._uploads = root / INTERNAL_NAME / "uploads"
        self._files = files
        self._retention = retention
        self._most_pending = most_pending
        self._changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._running: _Job | None = None
        self._error: Exception | None = None
        self._behind = True
        self._catching_up = False
        self._progress = MirrorProgress()
        self._thread: threading.Thread | None = None
        self._logged_at_s = 0.0

    def __repr__(self) -> str:
        return f"<Mirror {self.bucket} {self.progress}>"

    @property
    def progress(self) -> MirrorProgress:
        """How far it is."""
        with self._changed:
            return replace(self._progress, pending=len(self._jobs))

    @property
    def started(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None

    # ----------------------------------------------------------------------------------- the queue

    def start(self) -> None:
        """Take up what an earlier process left, and what the mirror lacks. Once a process."""
        if self._thread is not None:
            return
        self._catching_up = True
        self._thread = threading.Thread(target=self._work, name="keepstep-mirror", daemon=True)
        self._thread.start()
        mirror = weakref.ref(self)

        def drain() -> None:
            if (alive := mirror()) is not None:
                alive.drain()

        atexit.register(drain)

    def offer(self, directory: Path, manifest: Manifest) -> None:
        """Have a committed checkpoint uploaded. Never raises: the checkpoint itself is safe."""
        try:
            linked = self._link(directory, manifest)
        except (OSError, KeepstepError) as error:
            log.error("%s will not be mirrored: %s", directory, error)
            return
        with self._changed:
            for job in self._jobs:
                job.failed = False
            self._add(_Job(linked, manifest, directory.name))

    def _add(self, job: _Job) -> None:
        self._jobs = sorted([*self._jobs, job], key=lambda job: job.number)
        waiting = [job for job in self._jobs[:-1] if not job.must_go]
        for late in waiting[: max(0, len(self._jobs) - self._most_pending)]:
            self._jobs.remove(late)
            self._progress = replace(self._progress, skipped=self._progress.skipped + 1)
            log.warning("%s is not mirrored to %s: newer ones overtook it", late.name, self.bucket)
            self._forget(late)
        self._changed.notify_all()

    def _link(self, directory: Path, manifest: Manifest) -> Path:
        """The checkpoint's files under a second name; the manifest last."""
        target = self._uploads / f"{directory.name}.{manifest.id}"
        if (target / MANIFEST_NAME).exists():
            return target
        self._files.make_directory(self._uploads)
        if target.exists():
            self._files.remove_tree(target)
        self._files.make_directory(target)
        for name in [*manifest.files, MANIFEST_NAME]:
            self._files.link(directory / name, target / name)
        return target

    def _forget(self, job: _Job) -> None:
        try:
            self._files.remove_tree(job.directory)
        except OSError as error:
            log.warning("could not remove %s (%s)", job.directory, error)

    def wait(self, on_error: Literal["raise", "warn"] = "raise") -> None:
        """Wait until every checkpoint is mirrored, or has failed to be.

        Raises:
            MirrorError: one could not be uploaded; the cause is chained. It is tried again after the next
                save, or by the next process. With `on_error="warn"` this is a warning.
        """
        with self._changed:
            while self._thread is not None and (self._is_busy or any(not job.failed for job in self._jobs)):
                self._changed.wait()
            error, self._error = self._error, None
        if error is None:
            return
        said = MirrorError(
            f"not everything could be mirrored to {self.bucket}: {error}. It is safe in {self._root}, and is "
            "tried again after the next save and when the next process writes to the store"
        )
        if on_error == "raise":
            raise said from error
        warnings.warn(str(said), stacklevel=2)

    @property
    def _is_busy(self) -> bool:
        return self._running is not None or self._catching_up

    def drain(self) -> None:
        """At the end of the process: wait, and log what fails."""
        with self._changed:
            left = len(self._jobs) + self._is_busy
        if left:
            log.warning("waiting for the upload of %d checkpoint(s) to %s", left, self.bucket)
        try:
            self.wait()
        except MirrorError as error:
            log.critical("keepstep: %s", error)

    # ----------------------------------------------------------------------------------- uploading

    def _work(self) -> None:
        while True:
            if self._behind:
                self._catch_up()
            with self._changed:
                self._catching_up = False
                self._changed.notify_all()
                while not any(not job.failed for job in self._jobs):
                    self._changed.wait()
                job = self._running = next(job for job in self._jobs if not job.failed)
                self._jobs.remove(job)
                total = job.manifest.bytes
                self._progress = replace(self._progress, uploading=job.name, bytes_done=0, bytes_total=total)
            error = self._try(job)
            with self._changed:
                self._running = None
                job.failed = error is not None
                if error is not None:
                    self._error = error
                    self._jobs = sorted([*self._jobs, job], key=lambda job: job.number)
                self._progress = replace(
                    self._progress,
                    uploading=None,
                    mirrored=self._progress.mirrored + (error is None),
                    failed=self._progress.failed + (error is not None),
                )
                self._changed.notify_all()

    def _catch_up(self) -> None:
        """What was linked by a process that died, and what was committed without being linked."""
        try:
            mirrored = {entry.manifest.id for entry in catalog.scan(self.bucket) if entry.manifest}
            for directory in sorted(self._uploads.iterdir()) if self._uploads.is_dir() else []:
                with contextlib.suppress(DamagedCheckpointError):
                    manifest = read_manifest(directory)
                    self._offer_missing(directory, manifest, directory.name.partition(".")[0], mirrored)
                    continue
                self._files.remove_tree(directory)
            for entry in catalog.scan(self._root):
                manifest_there = entry.manifest
                if isinstance(entry.path, Path) and manifest_there and manifest_there.id not in mirrored:
                    linked = self._link(entry.path, manifest_there)
                    self._offer_missing(linked, manifest_there, entry.name, mirrored)
            self._behind = False
        except (OSError, KeepstepError) as error:
            log.error("the mirror %s could not be brought up to date: %s", self.bucket, error)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _offer_missing(self, directory: Path, manifest: Manifest, name: str, mirrored: set[str]) -> None:
        job = _Job(directory, manifest, name)
        with self._changed:
            known = [*self._jobs, *([self._running] if self._running else [])]
            if any(other.manifest.id == manifest.id for other in known):
                return
            if manifest.id not in mirrored:
                self._add(job)
                return
        self._forget(job)

    def _try(self, job: _Job) -> Exception | None:
        try:
            self._upload(job)
        except (OSError, KeepstepError) as error:
            log.error("%s was not mirrored to %s: %s", job.name, self.bucket, error)
            return error
        self._forget(job)
        try:
            if not self._retention.keeps_all:
                prune(self.bucket, self._retention)
        except (OSError, KeepstepError) as error:
            log.warning("old checkpoints of the mirror %s could not be deleted: %s", self.bucket, error)
        return None

    def _upload(self, job: _Job) -> None:
        self.bucket.claim()
        there = self.bucket.at(job.name)
        if there.exists():
            if read_manifest(there).id == job.manifest.id:
                return
            raise StoreError(f"{there} is another checkpoint already; give each run a mirror of its own")
        report = verify_checkpoint(job.directory)
        if not report.sound:
            raise DamagedCheckpointError(job.directory, "; ".join(report.problems))
        holders = self._holders()
        workspace = self.bucket.reserve_for(job.name, job.manifest.id)
        try:
            files = {
                name: self._upload_file(workspace, job, name, entry, holders)
                for name, entry in job.manifest.files.items()
            }
            workspace.commit(dump_manifest(replace(job.manifest, files=files)))
        finally:
            workspace.discard()
        log.info("%s is mirrored to %s", job.name, self.bucket)

    def _holders(self) -> dict[tuple[str, str, int], str]:
        """Which checkpoint of the mirror holds a file of that name, digest and size."""
        holders = {}
        for entry in catalog.scan(self.bucket):
            for name, file in entry.manifest.files.items() if entry.manifest else ():
                holders[name, file.digest, file.bytes] = entry.name
        return holders

    def _upload_file(
        self,
        workspace: BucketWorkspace,
        job: _Job,
        name: str,
        entry: FileEntry,
        holders: dict[tuple[str, str, int], str],
    ) -> FileEntry:
        holder = holders.get((name, entry.digest, entry.bytes))
        if holder is not None:
            with contextlib.suppress(FileNotFoundError):
                within = workspace.link(name, holder, name, entry)
                self._advance(entry.bytes)
                return replace(entry, within=within)
        if workspace.has(name, entry.bytes):  # from an attempt that was cut off
            self._advance(entry.bytes)
        else:
            workspace.upload_file(name, job.directory / name, entry.bytes, self._advance)
        return replace(entry, within=None)

    def _advance(self, count: int) -> None:
        now_s = time.monotonic()
        with self._changed:
            done = self._progress.bytes_done + count
            self._progress = progress = replace(self._progress, bytes_done=done)
        if now_s - self._logged_at_s >= _LOG_EVERY_S:
            self._logged_at_s = now_s
            log.info("mirroring %s: %d of %d MiB", progress.uploading, done >> 20, progress.bytes_total >> 20)


# --------------------------------------------------------------------------------------------- pulling


def pull_newest(bucket: BucketBackend, root: Path, files: Files, claim: Callable[[], None]) -> Path | None:
    """Bring the newest sound checkpoint of a mirror to a directory, if that has none as new.

    It is read into an unfinished directory, every byte is verified, and one rename publishes it.

    Args:
        bucket: the mirror.
        root: the directory of the store.
        files: how the disk is changed.
        claim: makes this process the one that writes there; called before anything is.

    Returns:
        Where it lies now; None if the directory is as new as the mirror.

    Raises:
        StoreError: the mirror can't be read, or the directory not be written to.
    """
    whole = (entry.number for entry in catalog.scan(root) if catalog.damage_of(entry) is None)
    newest = max(whole, default=-1)
    for entry in reversed(catalog.scan(bucket)):
        if entry.number <= newest:
            return None
        if entry.manifest is None:
            continue
        claim()
        log.info("pulling %s", entry.path)
        try:
            return _pull(entry, root, files)
        except DamagedCheckpointError as error:
            log.error("%s is damaged and is passed over: %s", entry.path, error.message)
    return None


def _pull(entry: catalog.Entry, root: Path, files: Files) -> Path:
    assert entry.manifest is not None
    final = root / entry.name
    manifest = replace(
        entry.manifest,
        files={name: replace(file, within=None) for name, file in entry.manifest.files.items()},
    )
    workspace = LocalWorkspace(files, final, may_replace=True)
    with workspace.explained():
        try:
            workspace.open()
            for name, file in entry.manifest.files.items():
                _fetch(entry, workspace, name, file)
            data = dump_manifest(manifest)
            workspace.write_file(MANIFEST_NAME, data)
            report = verify_checkpoint(workspace.path)
            if not report.sound:
                raise DamagedCheckpointError(entry.path, "; ".join(report.problems))
            workspace.commit(data)
        except BaseException:
            workspace.discard()
            raise
    return final


def _fetch(entry: catalog.Entry, workspace: LocalWorkspace, name: str, file: FileEntry) -> None:
    """One file, in blocks that its segment takes as they are."""
    opened = source_of(entry.path).open(name, file)
    block = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
    segment = workspace.create_segment(name, file.bytes)
    try:
        for begin in range(0, file.bytes, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, file.bytes - begin)
            done = 0
            while done < size:
                count = opened.read_into(block[done:size], begin + done)
                if count == 0:
                    raise DamagedCheckpointError(entry.path, f"{name} ends at byte {begin + done}")
                done += count
            segment.write_at(block[: -(-size // mmap.PAGESIZE) * mmap.PAGESIZE], begin)
        segment.finish()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(entry.path, f"{name} is missing ({error.filename})") from error
    finally:
        segment.abandon()
