"""The face of the engine: `Store`, `Checkpoint`, `PendingSave`."""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from keepstep.checkpoint.engine import Engine, make_engine
from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.format.source import Place, place_exists
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.pruning import Which, prune
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.keeping.verify import Report, verify_checkpoint
from keepstep.checkpoint.mirror import Mirror
from keepstep.checkpoint.place.backend import Backend, Workspace
from keepstep.checkpoint.place.directory import LocalBackend, forget_places_after_fork
from keepstep.checkpoint.place.registry import is_address, open_bucket
from keepstep.checkpoint.pulling import pull_newest
from keepstep.checkpoint.recovery import restore_newest
from keepstep.checkpoint.saving.crew import Crew
from keepstep.checkpoint.saving.save import Description, Lineage, Save, describe
from keepstep.checkpoint.upkeep import Bystander, Upkeep
from keepstep.checkpoint.version import Checkpoint, PendingSave, unseen_failures
from keepstep.errors import (
    BackgroundSaveError,
    BucketError,
    CheckpointNotFoundError,
    NoValidCheckpointError,
    StoreBusyError,
    StoreError,
    StoreReadOnlyError,
    UsageError,
)
from keepstep.files import Files
from keepstep.world import OneRank, World

__all__ = [
    "AWAITED_UP_TO_BYTES",
    "AWAITED_UP_TO_BYTES_ON_DEVICES",
    "DEFAULT_MEMORY_BUDGET_BYTES",
    "Staging",
    "Store",
]

DEFAULT_MEMORY_BUDGET_BYTES = 2 << 30

AWAITED_UP_TO_BYTES = 256 << 20
"""States on the host of at most this size are copied at once by default, which blocks for some 30 ms a
130 MB: the training's own cores copy, and a copy behind the training takes more from it than it hides."""

AWAITED_UP_TO_BYTES_ON_DEVICES = 16 << 20
"""The same where an accelerator trains and the host's cores are idle."""

Staging = Literal["auto", "awaited", "overlapped"]
"""Whether the training waits until a state is copied, or goes on; see `Store.save_in_background`."""

log = logging.getLogger(__name__)


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """Checkpoints of one run, in one directory: `checkpoint_0`, `checkpoint_1`, ...

    One process at a time writes to a store; any number may read.

    Args:
        path: the directory, made at the first save; or the address of a place in a bucket, as
            "s3://bucket/run", "gs://bucket/run" or "az://container/run" (needs `keepstep[objects]`).
        storage_options: for a bucket: what obstore's `from_url` takes ("endpoint", "region", "access_key_id"
            ...), "profile" (of AWS), and "timeout_s" (60), "connect_timeout_s" (5), "max_retries" (10),
            "retry_timeout_s" (120) of a request. What is not said comes from the environment.
        mirror: the address of a place in a bucket for copies of what is committed to the directory `path`.
            They are uploaded in the background; a machine whose directory has nothing as new takes the newest
            from there.
        mirror_retention: what the mirror keeps; None: the same as `retention`.
        mirror_pending: checkpoints that may wait for their upload. If more do, the oldest that are neither
            tagged nor pinned are not mirrored; the newest always is.
        retention: what to keep, applied after each commit; None keeps everything.
        memory_budget_bytes: most host memory for staging saves in the background, kept for the next one.
        spare_other_runs: `retention` is about this run's checkpoints alone; those that another run left here
            (one that was not resumed) are never dropped.
        scrub_interval_s: while this process writes to the store, verify each older checkpoint again after so
            many seconds, on a thread of lowest priority; damaged ones are named in an error log and set aside
            as in `load_latest_into`. None: don't.
        scrub_bytes_per_s: how fast it reads at most; None: 50 MB/s.
        files: how the disk is changed; tests pass one that fails on purpose.
        world: the ranks that save and load together, `keepstep.world.Ranks()`; None for one process. With
            many ranks every call that saves or loads is made by all of them, and the directory is one that
            they all see. Rank 0 holds the lock, commits and prunes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        storage_options: Mapping[str, Any] | None = None,
        mirror: str | None = None,
        mirror_retention: Retention | None = None,
        mirror_pending: int = 2,
        retention: Retention | None = None,
        memory_budget_bytes: int = DEFAULT_MEMORY_BUDGET_BYTES,
        spare_other_runs: bool = False,
        scrub_interval_s: float | None = None,
        scrub_bytes_per_s: float | None = None,
        files: Files | None = None,
        world: World | None = None,
    ) -> None:
        self._world: World = world if world is not None else OneRank()
        if self._world.size > 1 and is_address(path):
            raise UsageError(f"{path} is a bucket; {self._world.size} ranks can save to a directory only")
        # A program may change its directory between two saves.
        self._root = path if is_address(path) else Path(path).absolute()
        self._storage_options = storage_options
        if mirror is not None and not (isinstance(self._root, Path) and is_address(mirror)):
            raise UsageError(f"mirror is {mirror!r} of {path}; expected the bucket for copies of a directory")
        self._mirror_address, self._mirror_pending = mirror, mirror_pending
        self._mirror_retention = mirror_retention
        for name, given in (("retention", retention), ("mirror_retention", mirror_retention)):
            if given is not None and not isinstance(given, Retention):
                raise UsageError(f"{name} is {given!r:.100}; expected a Retention, as Retention(keep_last=3)")
        self.retention = retention if retention is not None else Retention()
        self._lineage = Lineage(run=secrets.token_hex(8))
        self._spare_other_runs = spare_other_runs
        self._scrub = {"scrub_interval_s": scrub_interval_s, "scrub_bytes_per_s": scrub_bytes_per_s}
        self._start(make_engine(files, memory_budget_bytes, self._world, str(self._root)))
        _stores.add(self)

    def _start(self, engine: Engine) -> None:
        """Everything that belongs to this process; a fork starts anew, without its parent's threads."""
        self._engine = engine
        self._one_save = threading.RLock()
        self._in_flight: PendingSave | None = None
        self._backend = self._open_backend(engine.files)
        self.mirror = self._open_mirror(engine.files)
        self._upkeep = (Bystander if self._world.rank else Upkeep)(self._backend, **self._scrub)
        weakref.finalize(self, self._upkeep.stop)
        if self.mirror is not None:
            weakref.finalize(self, self.mirror.stop)

    def _open_backend(self, files: Files) -> Backend:
        if isinstance(self._root, Path):
            return LocalBackend(files, self._root)
        return open_bucket(os.fspath(self._root), self._storage_options)

    def _open_mirror(self, files: Files) -> Mirror | None:
        backend = self._backend
        if self._mirror_address is None or self._world.rank or not isinstance(backend, LocalBackend):
            return None
        return Mirror(
            self.path,
            open_bucket(self._mirror_address, self._storage_options),
            files=files,
            retention=self._mirror_retention if self._mirror_retention is not None else self.retention,
            most_pending=self._mirror_pending,
            reached=backend.raise_floor,
        )

    def _pull(self) -> Path | None:
        """Take the newest checkpoint from the mirror, if it is newer than all here.

        Raises:
            StoreError: nothing is here, and the mirror can't be read; or it is newer and can't be brought.
            NoValidCheckpointError: nothing is here, and all that the mirror holds is damaged.
        """
        if self.mirror is None or not isinstance(self._backend, LocalBackend):
            return None
        try:
            return pull_newest(self.mirror.bucket, self._backend, self._engine.files)
        except (BucketError, StoreBusyError, StoreReadOnlyError) as error:
            if not catalog.scan(self._backend):
                raise
            log.warning("no newer checkpoint could be taken from the mirror: %s", error)
            return None

    def _replace_damaged(self, place: Place, problem: str) -> bool:
        """Set a damaged checkpoint aside; whether the mirror's copy of it stands there now."""
        self._upkeep.set_aside(place, problem)
        if place_exists(place):
            return False
        with contextlib.suppress(NoValidCheckpointError):
            return self._pull() == place
        return False

    @property
    def path(self) -> Path:
        """Its directory.

        Raises:
            UsageError: it is a bucket; `address` says which.
        """
        if not isinstance(self._root, Path):
            raise UsageError(f"{self.address} is a bucket and has no path; see Store.address")
        return self._root

    @property
    def address(self) -> str:
        """Its directory or address, for people."""
        return str(self._backend)

    @property
    def next_number(self) -> int:
        """The number of the next checkpoint."""
        return self._backend.next_number()

    def __repr__(self) -> str:
        return f"Store({self.address!r})"

    @property
    def run(self) -> str:
        """The id of the run that this store writes for: a new one, or that of what was loaded last."""
        return self._lineage.run

    # ------------------------------------------------------------------------------------- saving

    def save(
        self,
        state: Any,
        *,
        step: int | None = None,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        pinned: bool = False,
        environment: Mapping[str, Any] | None = None,
        per_rank: Any = None,
    ) -> Checkpoint:
        """Save a checkpoint; it is durable and committed on return.

        Args:
            state: any nesting of dict, list and tuple of tensors, arrays, plain values and live objects
                with `state_dict`/`load_state_dict`. Each root key becomes a file.
            step: optimizer steps done.
            epoch: the epoch under way.
            metrics: name -> number (a one-element tensor will do) or string.
            tags: names; a tagged checkpoint is never pruned.
            pinned: never prune it.
            environment: more to write down beside versions, host and command line (a configuration, say):
                names with what JSON can hold.
            per_rank: what is this rank's own (random states, its place in the data): any state.

        Raises:
            RankError: with many ranks: one failed, or did not come; no checkpoint was made.
            StateError: the state cannot be saved as it is; nothing was written.
            StoreBusyError: another process writes to this store.
            NoSpaceError, StoreReadOnlyError, StoreError: nothing of this checkpoint is left, older ones
                are whole.
            BackgroundSaveError: an earlier save in the background had failed.
        """
        description = describe(
            step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned, environment=environment
        )
        with self._one_save:
            self.wait()
            save = self._begin(state, description, per_rank)
            try:
                return self._committed(save.workspace.final, save.write())
            finally:
                self._backend.release(save.workspace)

    def save_in_background(
        self,
        state: Any,
        *,
        step: int | None = None,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        pinned: bool = False,
        environment: Mapping[str, Any] | None = None,
        per_rank: Any = None,
        staging: Staging = "awaited",
        changing: Iterable[torch.Tensor] = (),
    ) -> PendingSave:
        """Copy the state; hashing, writing and the commit go on in the background.

        One save is in flight at a time: a second waits for the first. Errors as for `save`; an error of the
        background is raised by `PendingSave.wait`, or as `BackgroundSaveError` by the next save or `wait`.

        Args:
            state: as for `save`.
            step: optimizer steps done.
            epoch: the epoch under way.
            metrics: name -> number or string.
            tags: names; a tagged checkpoint is never pruned.
            pinned: never prune it.
            environment: more to write down beside versions, host and command line.
            per_rank: what is this rank's own.
            staging: "awaited": the state may change as soon as this returns. "overlapped": the copy is made
                in the background as well, and the state must not change until `PendingSave.wait_staged` has
                returned. Tensors that torch saw written to before are found out by their version counters:
                nothing is committed, and the error names them. "auto": the one that costs less for a state of
                this size; treat it as "overlapped".
            changing: tensors that may change at once all the same, such as buffers that a forward updates;
                they are copied before this returns. So is all memory of NumPy's. If that comes to more than
                128 MiB, everything is copied before this returns.
        """
        description = describe(
            step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned, environment=environment
        )
        with self._one_save:
            self.wait()
            began = time.perf_counter()
            save = self._begin(state, description, per_rank)
            crew = Crew(1, "keepstep-commit")
            staged = threading.Event()
            try:
                most = AWAITED_UP_TO_BYTES_ON_DEVICES if save.on_devices else AWAITED_UP_TO_BYTES
                behind = staging == "overlapped" or (staging == "auto" and save.bytes > most)
                if behind and save.hold(changing):
                    crew.step_back()
                    future = crew.submit(lambda: self._stage_and_finish(save, staged))
                else:
                    save.stage()
                    staged.set()
                    future = crew.submit(lambda: self._finish(save))
                self._in_flight = PendingSave(
                    future, staged=staged, seal=save.seal, blocked_s=time.perf_counter() - began
                )
            except BaseException:  # Ctrl-C, perhaps just after the work was handed in: it may be committing
                crew.close()
                crew.wait()
                self._backend.release(save.workspace)
                save.discard()
                raise
            finally:
                crew.close()
            return self._in_flight

    def _stage_and_finish(self, save: Save, staged: threading.Event) -> Checkpoint:
        try:
            save.stage()
        except BaseException:
            self._backend.release(save.workspace)
            raise
        finally:
            staged.set()
        return self._finish(save)

    @property
    def busy(self) -> bool:
        """Whether a save is in flight in the background."""
        return self._in_flight is not None and not self._in_flight.done()

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            BackgroundSaveError: it, or an earlier one nobody asked about, failed.
        """
        pending = self._in_flight
        if pending is None:
            return
        try:
            with contextlib.suppress(BackgroundSaveError) if pending.seen else contextlib.nullcontext():
                pending.wait()
        finally:
            if pending.done() and self._in_flight is pending:  # not so if the waiting was interrupted
                self._in_flight = None

    def _finish(self, save: Save) -> Checkpoint:
        try:
            return self._committed(save.workspace.final, save.finish())
        finally:
            self._backend.release(save.workspace)

    def _begin(self, state: Any, description: Description, own: Any) -> Save:
        reserved: list[Workspace] = []

        def reserve() -> Workspace:
            self.claim()
            if self._upkeep.found_damage():
                self._engine.planner.forget()
            reserved.append(self._backend.reserve())
            return reserved[-1]

        try:
            save = self._engine.save(reserve, state, description, self._lineage, own)
            try:
                self._upkeep.before_save(save.bytes_of_all, self.retention, self._retained)
            except BaseException:
                save.discard()
                raise
            return save
        except BaseException:
            for workspace in reserved:
                self._backend.release(workspace)
            raise

    def _committed(self, path: Place, manifest: Manifest) -> Checkpoint:
        self._lineage = Lineage(run=manifest.run, attempt=manifest.attempt, parent=manifest.id)
        if self.mirror is not None and isinstance(path, Path):
            self.mirror.offer(path, manifest)
        self._upkeep.after_commit(path, manifest, self.retention, self._retained)
        return Checkpoint(path, manifest)

    def claim(self) -> None:
        """Become the one process that writes here, and clear what dead ones left.

        The first save does so by itself; a run that claims its store at the start learns at once that
        another one is still writing.

        Raises:
            StoreBusyError: another process writes to this store.
            StoreReadOnlyError, StoreError: the directory can't be written to.
        """
        self._upkeep.claim()
        if self.mirror is not None and not self.mirror.started:
            self._join_mirror(self.mirror)

    def _join_mirror(self, mirror: Mirror) -> None:
        try:
            if isinstance(self._backend, LocalBackend):
                self._backend.raise_floor(mirror.bucket.next_number())
        except StoreError as error:
            log.warning("the mirror can't be reached; training goes on without it for now: %s", error)
        mirror.start()

    def close(self) -> None:
        """Wait for the save in flight and the mirror, and stop the scrub, which stays off.

        Raises:
            BackgroundSaveError: the save in flight failed.
            MirrorError: something could not be mirrored.
        """
        self._upkeep.stop()
        self.wait()
        if self.mirror is not None:
            try:
                self.mirror.wait()
            finally:
                self.mirror.stop()

    # ------------------------------------------------------------------------------------ finding

    def list(self) -> list[Checkpoint]:
        """All checkpoints with a readable manifest, oldest first. Reads manifests only."""
        return [Checkpoint(e.path, e.manifest) for e in catalog.scan(self._backend) if e.manifest is not None]

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose manifest is sound and whose files are all there and whole in size.

        Damaged ones are named in a warning and passed over. Data is verified when it is loaded. If the
        mirror has a newer one, it is brought here first.
        """
        self._pull()
        gone = False
        for entry in reversed(catalog.scan(self._backend)):
            damage = catalog.damage_of(entry)
            if damage is None and entry.manifest is not None:
                return Checkpoint(entry.path, entry.manifest)
            if not place_exists(entry.path):
                gone = True
                continue
            log.warning("passing over the damaged checkpoint %s: %s", entry.path, damage)
        return self.latest() if gone else None  # who deletes an older one has saved a newer one

    def get(self, name: str) -> Checkpoint:
        """The checkpoint with this name ("checkpoint_12").

        Raises:
            CheckpointNotFoundError: there is none.
            ManifestError: its manifest is damaged.
        """
        entry = catalog.find(self._backend, name)
        return Checkpoint(entry.path, entry.manifest if entry.manifest else read_manifest(entry.path))

    def best(self, metric: str, mode: Literal["min", "max"] = "min") -> Checkpoint | None:
        """The checkpoint with the smallest or largest value of a metric; the newest of equals.

        Checkpoints without the metric, or where it is NaN, don't count; None if none is left.

        Raises:
            UsageError: `mode` is neither "min" nor "max".
        """
        entry = catalog.best_of(catalog.scan(self._backend), metric, mode)
        return None if entry is None or entry.manifest is None else Checkpoint(entry.path, entry.manifest)

    def verify(self, *, quick: bool = False) -> Sequence[Report]:
        """Verify every checkpoint, oldest first. If one is damaged, the next save links to none of them."""
        reports = [verify_checkpoint(entry.path, quick=quick) for entry in catalog.scan(self._backend)]
        if any(not report.sound for report in reports):
            self._upkeep.note_damage()
        return reports

    # ----------------------------------------------------------------------------------- resuming

    def load_latest_into(self, objects: Any, *, per_rank: Any = None) -> Checkpoint | None:
        """Restore the newest valid checkpoint into live objects, falling back over damaged ones.

        A damaged checkpoint is named in an error log, moved aside (into `.keepstep/damaged/`, never
        deleted), and the mirror's copy of it, if there is one, or the next older one is taken, which
        overwrites everything. If the mirror has a newer one, it is brought here first. Many ranks take the
        same one: if one of them finds damage, all take the next.

        Args:
            objects: see `Checkpoint.load_into`.
            per_rank: live objects that take what this rank saved as its own. Fewer ranks may have saved;
                then they stay as they are on the ranks beyond, and a warning says so.

        Returns:
            The checkpoint that was restored; None if the store holds none.

        Raises:
            NoValidCheckpointError: there are checkpoints, and all are damaged.
            StoreError: the system refuses to read (permission, open files, memory); nothing is set aside.
            MismatchError, RestoreError: as for `Checkpoint.load_into`.
        """
        self.wait()
        self._pull()

        def restore(checkpoint: Checkpoint) -> None:
            checkpoint.load_into(objects, per_rank=per_rank, rank=self._world.rank)

        checkpoint = restore_newest(self._backend, restore, self._replace_damaged, self._world)
        if checkpoint is not None:
            manifest = checkpoint.manifest
            self._engine.planner.adopt(checkpoint.name, manifest.files, checkpoint.tensors)
            self._lineage = Lineage(run=manifest.run, attempt=manifest.attempt + 1, parent=manifest.id)
        return checkpoint

    # ------------------------------------------------------------------------------------ pruning

    def delete(self, checkpoint: Checkpoint | str) -> None:
        """Delete one checkpoint: out of sight by a rename first, then its files.

        Raises:
            CheckpointBusyError: it is being read.
            CheckpointNotFoundError: it is not (or no longer) in this store.
            StoreError: the disk refuses.
        """
        name = checkpoint if isinstance(checkpoint, str) else checkpoint.name
        entry = catalog.find(self._backend, name)
        if not isinstance(checkpoint, str) and not self._backend.holds(checkpoint.place):
            raise CheckpointNotFoundError(
                errno.ENOENT, f"{checkpoint.place} is not in {self.address}; delete it through its own store"
            )
        try:
            self._backend.delete(entry.path)
        except StoreError as error:
            if place_exists(entry.path) or not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise CheckpointNotFoundError(errno.ENOENT, f"{entry.path} was deleted meanwhile") from error

    def prune(self) -> Sequence[str]:
        """Delete what `retention` does not keep, but nothing that is being read. Called after each commit.

        Returns:
            The names of the deleted checkpoints.
        """
        return prune(self._backend, self.retention, self._retained)

    @property
    def _retained(self) -> Which:
        """Which checkpoints `retention` is about."""
        return (lambda manifest: manifest.run == self._lineage.run) if self._spare_other_runs else None


@atexit.register
def _report_unseen_failures() -> None:
    """The last chance to say that a background save failed; Python has waited for the threads by now."""
    for pending in list(unseen_failures):
        try:
            pending.wait()
        except BackgroundSaveError as error:
            log.critical("keepstep: %s", error)


def _start_anew_after_fork() -> None:
    """A child has none of its parent's threads and locks; the save in flight is its parent's business."""
    forget_places_after_fork()
    unseen_failures.clear()
    for store in list(_stores):
        store._start(store._engine.anew())


os.register_at_fork(after_in_child=_start_anew_after_fork)
