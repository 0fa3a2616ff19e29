"""Saves into one store, one in flight at a time: begun, copied, finished behind the training, committed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch

from keepstep.checkpoint.crew import Crew
from keepstep.checkpoint.engine import Engine, Order
from keepstep.checkpoint.format.manifest import Manifest
from keepstep.checkpoint.format.source import Place
from keepstep.checkpoint.keeping.pruning import Which
from keepstep.checkpoint.mirror import Mirror
from keepstep.checkpoint.parts import Blueprint, Parts
from keepstep.checkpoint.pending import PendingSave
from keepstep.checkpoint.place.backend import HostWorkspace
from keepstep.checkpoint.place.directory import LocalBackend
from keepstep.checkpoint.saving.description import Description, Lineage
from keepstep.checkpoint.saving.save import Save
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import BackgroundSaveError, DamagedCheckpointError, StoreError, UsageError
from keepstep.meetings import amid_another
from keepstep.outcome import Latch

__all__ = ["Saves", "Staging"]

AWAITED_UP_TO_BYTES: Final = 256 << 20
"""States on the host of at most this size are copied at once by default, which blocks for some 30 ms a
130 MB: the training's own cores copy, and a copy behind the training takes more from it than it hides."""

AWAITED_UP_TO_BYTES_ON_DEVICES: Final = 16 << 20
"""The same where an accelerator trains and the host's cores are idle."""

Staging = Literal["auto", "awaited", "overlapped"]
"""Whether the training waits until a state is copied, or goes on; see `Store.save_in_background`."""

log = logging.getLogger(__name__)


class Saves:
    """The saves of one process into one store.

    Args:
        parts: of the store.
        lineage: which run writes, and after which checkpoint; kept up with what is saved and loaded.
        rules: the arguments of the store.
    """

    def __init__(self, parts: Parts, lineage: Lineage, rules: Blueprint) -> None:
        self._parts = parts
        self._rules = rules
        self.lineage = lineage
        self._one_save = threading.RLock()
        self._in_turn = False
        self._in_flight: list[PendingSave] = []  # one, and those begun in the middle of beginning it

    @property
    def retained(self) -> Which:
        """Which checkpoints the retention is about."""
        return (lambda manifest: manifest.run == self.lineage.run) if self._rules.spare_other_runs else None

    def follow(self, loaded: Checkpoint) -> None:
        """Go on with the run of a checkpoint that was loaded; the next save may take over its files."""
        manifest = loaded.manifest
        try:
            self._parts.engine.follow(loaded.name, manifest, loaded.tensors)
        except (DamagedCheckpointError, StoreError, OSError) as error:  # it was deleted meanwhile, say
            log.debug("nothing will be linked to %s: %s", loaded.path, error)
            self._parts.engine.forget()
        self.lineage = Lineage(run=manifest.run, attempt=manifest.attempt + 1, parent=manifest.id)

    def go_on_from(self, loaded: Checkpoint) -> None:
        """Go on in the same process with a checkpoint of the same run; see `Store.go_on_from`."""
        if loaded.manifest.run == self.lineage.run:
            self.lineage = replace(self.lineage, parent=loaded.manifest.id)

    # ------------------------------------------------------------------------------- saving

    def save(self, state: Any, description: Description, own: Any) -> Checkpoint:
        """Save; durable and committed on return. See `Store.save`."""
        with self._turn() as engine:
            save = self._begin(engine, state, description, own)
            try:
                return self._committed(save.workspace.final, save.write())
            finally:
                self._parts.backend.release(save.workspace)

    def save_in_background(
        self,
        state: Any,
        description: Description,
        own: Any,
        *,
        staging: Staging,
        changing: Iterable[torch.Tensor],
        steady: Iterable[torch.Tensor],
    ) -> PendingSave:
        """Begin a save that goes on in the background. See `Store.save_in_background`."""
        if staging not in get_args(Staging):
            raise UsageError(f'staging is {staging!r}; allowed: "auto", "awaited" or "overlapped"')
        with self._turn() as engine:
            began = time.perf_counter()
            save = self._begin(engine, state, description, own)
            crew = Crew(1, "keepstep-commit")
            staged = Latch()
            try:
                if _may_copy_behind(save, staging) and save.hold(changing, steady):
                    crew.step_back()
                    outcome = crew.submit(lambda: self._stage_and_finish(save, staged))
                else:
                    save.stage()
                    staged.open()
                    outcome = crew.submit(lambda: self._finish(save))
                pending = PendingSave(
                    outcome,
                    place=save.workspace.final,
                    staged=staged,
                    seal=save.seal,
                    spoiled=lambda: save.is_spoiled,
                    blocked_s=time.perf_counter() - began,
                )
                self._in_flight.append(pending)
            except BaseException:  # Ctrl-C, perhaps just after the work was handed in: it may be committing
                crew.close()
                save.seal()  # nothing is written to until it is over
                crew.wait()
                self._parts.backend.release(save.workspace)
                save.discard()
                raise
            finally:
                crew.close()
            return pending

    @contextlib.contextmanager
    def _turn(self) -> Iterator[Engine]:
        """After the save in flight, and after those that other threads make; what makes the save.

        In the middle of a save of this thread, which waits with all that it holds, it is another engine.
        """
        with self._one_save:
            self.wait()
            if self._in_turn and self._rules.world.size > 1:
                raise amid_another(f"saving to {self._rules.root}")
            before, self._in_turn = self._in_turn, True
            try:
                yield Engine(self._rules.memory_budget_bytes) if before else self._parts.engine
            finally:
                self._in_turn = before

    @property
    def busy(self) -> bool:
        """Whether a save is in flight in the background."""
        return any(not pending.done() for pending in self._in_flight)

    def wait(self) -> None:
        """Wait for the save in flight, if any.

        Raises:
            BackgroundSaveError: it, or an earlier one nobody asked about, failed.
        """
        for pending in tuple(self._in_flight):
            try:
                with contextlib.suppress(BackgroundSaveError) if pending.seen else contextlib.nullcontext():
                    pending.wait()
            finally:
                if pending.done():  # not so if the waiting was interrupted
                    with contextlib.suppress(ValueError):  # another thread has waited as well
                        self._in_flight.remove(pending)

    def claim(self) -> None:
        """Become the one process that writes; see `Store.claim`."""
        self._parts.upkeep.claim()
        if self._parts.mirror is not None and not self._parts.mirror.started:
            self._join_mirror(self._parts.mirror)

    # ------------------------------------------------------------------- from begin to commit

    def _begin(self, engine: Engine, state: Any, description: Description, own: Any) -> Save:
        parts, reserved = self._parts, list[HostWorkspace]()

        def reserve() -> HostWorkspace:
            self.claim()
            reserved.append(parts.backend.reserve())
            return reserved[-1]

        if parts.upkeep.found_damage():
            parts.engine.forget()
        try:
            order = Order(state=state, description=description, lineage=self.lineage, own=own)
            save = engine.save(reserve, order)
            try:
                parts.upkeep.before_save(save.bytes_of_all, self._rules.retention, self.retained)
            except BaseException:
                save.discard()
                raise
            return save
        except BaseException:
            for workspace in reserved:
                parts.backend.release(workspace)
            raise

    def _stage_and_finish(self, save: Save, staged: Latch) -> Checkpoint:
        try:
            save.stage()
        except BaseException:
            self._parts.backend.release(save.workspace)
            raise
        finally:
            staged.open()
        return self._finish(save)

    def _finish(self, save: Save) -> Checkpoint:
        try:
            return self._committed(save.workspace.final, save.finish())
        finally:
            self._parts.backend.release(save.workspace)

    def _committed(self, place: Place, manifest: Manifest) -> Checkpoint:
        self.lineage = Lineage(run=manifest.run, attempt=manifest.attempt, parent=manifest.id)
        if self._parts.mirror is not None and isinstance(place, Path):
            self._parts.mirror.offer(place, manifest)
        self._parts.upkeep.after_commit(place, manifest, self._rules.retention, self.retained)
        return Checkpoint(place, manifest)

    def _join_mirror(self, mirror: Mirror) -> None:
        try:
            if isinstance(self._parts.backend, LocalBackend):
                self._parts.backend.raise_floor(mirror.bucket.next_number())
        except StoreError as error:
            log.warning("the mirror can't be reached; training goes on without it for now: %s", error)
        mirror.start()


def _may_copy_behind(save: Save, staging: Staging) -> bool:
    """Whether the training is to go on while the state is copied."""
    most = AWAITED_UP_TO_BYTES_ON_DEVICES if save.on_devices else AWAITED_UP_TO_BYTES
    return staging == "overlapped" or (staging == "auto" and save.bytes > most)
