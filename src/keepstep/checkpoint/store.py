"""The face of the engine: `Store`, all checkpoints of one run."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from keepstep.checkpoint.format.parse import read_manifest
from keepstep.checkpoint.in_flight import Saves, Staging
from keepstep.checkpoint.keeping import catalog
from keepstep.checkpoint.keeping.pruning import prune
from keepstep.checkpoint.keeping.retention import Retention
from keepstep.checkpoint.keeping.verify import Report
from keepstep.checkpoint.newest import Newest
from keepstep.checkpoint.parts import Blueprint, root_of
from keepstep.checkpoint.pending import PendingSave, forget_unseen_failures
from keepstep.checkpoint.place.directory import forget_places_after_fork
from keepstep.checkpoint.recovery import Restore
from keepstep.checkpoint.saving.description import Lineage, describe
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import UsageError
from keepstep.files import Files, LocalFiles
from keepstep.world import OneRank, World

__all__ = ["DEFAULT_MEMORY_BUDGET_BYTES", "Store"]

DEFAULT_MEMORY_BUDGET_BYTES = 2 << 30

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
        world: the ranks that save and load together, `keepstep.world.Ranks()`; None for one process. All
            make each call that saves or loads, in a place that all see. Rank 0 locks, commits and prunes.
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
        self._blueprint = Blueprint(
            root=root_of(path),
            storage_options=storage_options,
            mirror=mirror,
            mirror_retention=mirror_retention,
            mirror_pending=mirror_pending,
            retention=retention if retention is not None else Retention(),
            spare_other_runs=spare_other_runs,
            memory_budget_bytes=memory_budget_bytes,
            scrub_interval_s=scrub_interval_s,
            scrub_bytes_per_s=scrub_bytes_per_s,
            files=files if files is not None else LocalFiles(),
            world=world if world is not None else OneRank(),
        )
        self._start(Lineage(run=secrets.token_hex(8)))
        _stores.add(self)

    def _start(self, lineage: Lineage) -> None:
        """Everything that belongs to this process; a fork starts anew, without its parent's threads."""
        parts = self._blueprint.make()
        self._saves = Saves(parts, lineage, self._blueprint)
        self._newest = Newest(parts, self._blueprint.files, self._blueprint.world)
        self._backend, self._upkeep, self.mirror = parts.backend, parts.upkeep, parts.mirror
        weakref.finalize(self, parts.upkeep.stop)
        if parts.mirror is not None:
            weakref.finalize(self, parts.mirror.stop)

    @property
    def path(self) -> Path:
        """Its directory.

        Raises:
            UsageError: it is a bucket; `address` says which.
        """
        root = self._blueprint.root
        if not isinstance(root, Path):
            raise UsageError(f"{self.address} is a bucket and has no path; see Store.address")
        return root

    @property
    def address(self) -> str:
        """Its directory or address, for people."""
        return str(self._backend)

    @property
    def retention(self) -> Retention:
        """What it keeps."""
        return self._blueprint.retention

    @property
    def next_number(self) -> int:
        """The number of the next checkpoint."""
        return self._backend.next_number()

    def __repr__(self) -> str:
        return f"Store({self.address!r})"

    @property
    def run(self) -> str:
        """The id of the run that this store writes for: a new one, or that of what was loaded last."""
        return self._saves.lineage.run

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
            NoSpaceError, StoreReadOnlyError, StoreError: the disk refuses. Older checkpoints are whole; what
                can't be removed of this one goes with a later save.
            BackgroundSaveError: an earlier save in the background had failed.
        """
        description = describe(
            step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned, environment=environment
        )
        return self._saves.save(state, description, per_rank)

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
        steady: Iterable[torch.Tensor] = (),
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
                behind; the state must not change until `PendingSave.wait_staged` has returned. Tensors
                that torch saw this thread write to before are found out: nothing is committed, and the error
                names them. Of a device's streams it waits for the current one: join others to that before.
                "auto": whichever costs less for this size; treat it as "overlapped".
            changing: tensors that may change at once all the same, such as buffers that a forward updates;
                they are copied before this returns. So are all memory of NumPy's, and DTensors that are not
                `steady`. If that comes to more than 128 MiB, everything is copied before this returns.
            steady: DTensors that only what waits for the copy writes to: torch counts not all writes to them.
        """
        description = describe(
            step=step, epoch=epoch, metrics=metrics, tags=tags, pinned=pinned, environment=environment
        )
        return self._saves.save_in_background(
            state, description, per_rank, staging=staging, changing=changing, steady=steady
        )

    @property
    def busy(self) -> bool:
        """Whether a save is in flight in the background."""
        return self._saves.busy

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            BackgroundSaveError: it, or an earlier one nobody asked about, failed.
        """
        self._saves.wait()

    def claim(self) -> None:
        """Become the one process that writes here, and clear what dead ones left.

        The first save does so by itself; claimed at the start, another writer is known at once.

        Raises:
            StoreBusyError, StoreReadOnlyError, StoreError: another process writes; or nobody can write here.
        """
        self._saves.claim()

    def close(self) -> None:
        """Wait for the save in flight and the mirror, and stop the scrub, which stays off.

        Raises:
            BackgroundSaveError, MirrorError: the save in flight failed; something could not be mirrored.
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
        mirror has a newer one, it is brought here first; not so on many ranks, which may call this one by
        one: there `load_latest_into` alone brings it.

        Raises:
            StoreError: the newest can't be read, and may well be whole: the system refuses to, or a newer
                keepstep wrote it. Loading the newest ends in the same way.
        """
        return self._newest.whole()

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
        """Verify every checkpoint, oldest first; a file that several share is read once.

        If one is damaged, the next save links to none of them.
        """
        return self._upkeep.verify(quick=quick)

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
        rank = self._blueprint.world.rank
        return self.load_latest_with(
            lambda checkpoint, agree: checkpoint.load_into(objects, per_rank=per_rank, rank=rank, agree=agree)
        )

    def load_latest_with(self, load: Restore) -> Checkpoint | None:
        """As `load_latest_into`, by a function that is handed checkpoints, newest first, until one loads.

        Args:
            load: is handed a checkpoint, and what to pass on as `agree` of `Checkpoint.load_into`.
        """
        self.wait()
        checkpoint = self._newest.restore(load)
        if checkpoint is not None:
            self._saves.follow(checkpoint)
        return checkpoint

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Say that the next save comes after this checkpoint, which was loaded by itself: its parent.

        One of another run changes nothing: that run is gone on with by loading the newest.
        """
        self._saves.go_on_from(checkpoint)

    # ------------------------------------------------------------------------------------ pruning

    def delete(self, checkpoint: Checkpoint | str) -> None:
        """Delete one checkpoint: out of sight by a rename first, then its files.

        Raises:
            CheckpointBusyError: it is being read.
            CheckpointNotFoundError: it is not (or no longer) in this store.
            StoreError: the disk refuses.
        """
        if isinstance(checkpoint, str):
            self._upkeep.delete(checkpoint)
        else:
            self._upkeep.delete(checkpoint.name, checkpoint.place)

    def prune(self) -> Sequence[str]:
        """Delete what `retention` does not keep, and nobody reads; their names. Called after each commit."""
        return prune(self._backend, self.retention, self._saves.retained)


def _start_anew_after_fork() -> None:
    """A child has none of its parent's threads and locks; the save in flight is its parent's business."""
    forget_places_after_fork()
    forget_unseen_failures()
    for store in list(_stores):
        store._start(store._saves.lineage)


os.register_at_fork(after_in_child=_start_anew_after_fork)
