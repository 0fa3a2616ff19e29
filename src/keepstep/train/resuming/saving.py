"""Saving and restoring a run: by hand, by policy in the background, and at the start."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from keepstep.checkpoint.convert.accelerate import (
    AccelerateState,
    is_accelerate_state,
    newest_accelerate_state,
)
from keepstep.checkpoint.engine import save_directory
from keepstep.checkpoint.in_flight import Staging
from keepstep.checkpoint.pending import PendingSave
from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import (
    BackgroundSaveError,
    CheckpointNotFoundError,
    NotPreparedError,
    StoreError,
    UsageError,
)
from keepstep.train.pace.counts import CheckpointCounts, Complaints, is_of_changed_state
from keepstep.train.pace.decision import Decision
from keepstep.train.pace.pacing import Pacer
from keepstep.train.pace.schedule import Due
from keepstep.train.ranks.alike import check_saving_alike
from keepstep.train.resuming.hooked import StateHooks
from keepstep.train.resuming.importing import tell_of_earlier
from keepstep.train.resuming.notices import Notices
from keepstep.train.resuming.restoring import Origins, lies_in, together
from keepstep.train.resuming.slips import Slips
from keepstep.train.resuming.state import Captured, TrainState
from keepstep.train.resuming.told import About, Told
from keepstep.train.settings.config import CheckpointPolicy, ProjectConfiguration

__all__ = ["Saver"]

_log = logging.getLogger(__name__)

_Loaded = TypeVar("_Loaded", Checkpoint, AccelerateState)


class Saver:
    """Saves and restores a `TrainState`.

    Args:
        state: of the run.
        store: automatic checkpoints; None without a project directory.
        project: whether `save` names checkpoints by itself.
        policy: when automatic checkpoints are due.
        pin_explicit: checkpoints saved by hand into the store are never pruned.
        provenance: what more is to be written down beside each state.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        state: TrainState,
        store: Store | None,
        project: ProjectConfiguration,
        policy: CheckpointPolicy,
        pin_explicit: bool,
        provenance: Callable[[], Mapping[str, Any]] = dict,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._store = store
        self._project = project
        self._policy = policy
        self._pin_explicit = pin_explicit
        self._provenance = provenance
        self._world = state.world
        self._pacer = Pacer(policy, waited_s=lambda: state.gate.waited_s, clock=clock)
        self._pending: PendingSave | None = None
        self._decision = Decision(state.world, policy)
        self._staging: Staging = policy.staging
        self._slips = Slips(state.world, policy)
        self._about = About()
        self._complaints = Complaints()
        self._notices = Notices(state.world)
        self._compared = False
        self._lonely_run = secrets.token_hex(8)
        self._lost: About | None = None
        self._told = Told()
        self._gave_up = False
        self.hooks = StateHooks(state.world)
        self._origins = Origins(state, self.hooks)

    @property
    def run(self) -> str:
        """Id of the run: that of its checkpoints."""
        return self._lonely_run if self._store is None else self._store.run

    @property
    def keeps(self) -> bool:
        """Whether there is a place for automatic checkpoints."""
        return self._store is not None

    @property
    def may_resume(self) -> bool:
        """Whether `resume()` may find something."""
        return self._store is not None and (self._project.mirror is not None or bool(self._store.list()))

    def is_in_project(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is one of the project's automatic ones."""
        return lies_in(checkpoint, self._project.checkpoints)

    @property
    def next_number(self) -> int:
        """Number of the next automatic checkpoint."""
        return self._require_store("save_iteration").next_number

    def _require_store(self, what: str) -> Store:
        if self._store is None:
            raise UsageError(
                f"{what} needs a place for automatic checkpoints, but the Accelerator has no project_dir. "
                "Pass Accelerator(project_dir=...)."
            )
        return self._store

    @property
    def counts(self) -> CheckpointCounts:
        """What has become of checkpoints so far."""
        return self._pacer.counts

    def checkpoint(self, metrics: Mapping[str, Any] | None, tags: Sequence[str]) -> PendingSave | None:
        """Save in the background if the policy says so; return None if not."""
        store = self._store or self._require_store("checkpoint()")
        busy = self._pending is not None and not self._pending.done()
        if not busy:
            self._ask_finished()
        state, entered_s = self._state, self._pacer.clock()
        state.check_steps()
        if not state.window.sync_gradients or state.ranks_apart:
            return None
        self._compare(store)
        self._told.tell(state.step, metrics)
        slipped = self._slips.found(self._pending, state.step, lost=self._lost is not None)
        if slipped:  # on some rank: all make it again, now
            self._ask_finished()
            busy = False
        due = self._decision.take(self._pacer, state.step, busy=busy)
        if due is not Due.YES and not slipped and (self._lost is None or self._world.size > 1):
            self._pacer.leave(busy=busy)
            if not state.optimizers:
                raise NotPreparedError(
                    "checkpoint() counts optimizer steps, but no optimizer went through prepare(). Prepare "
                    "it, or use save_state()."
                )
            return None
        self._begin(store, About(metrics=metrics, tags=tags))
        self._pacer.began(state.step, entered_s, self._pending, behind=busy)
        return self._pending

    def save_end(self) -> None:
        """Save the last steps, with what `checkpoint` was told of them."""
        self._require_store("end_training(finished=True)")
        self.save(None, metrics=self._told.at(self._state.step), tags=(), pinned=None)

    def tell_what_is_unsaved(self) -> None:
        """A run that ends has steps that no checkpoint holds, unless the last one was saved."""
        self._notices.ended(self.unsaved_steps)

    @property
    def unsaved_steps(self) -> int:
        """Optimizer steps since the last checkpoint; 0 where none is kept."""
        if self._store is None:
            return 0
        return self._state.step - self._pacer.safe_step

    @property
    def is_unsaved(self) -> bool:
        """Whether the state is another one than that of the last checkpoint of this run."""
        return self.unsaved_steps > 0 or self._gave_up

    def begin_anew(self) -> None:
        """What was prepared is given up, and its steps with it."""
        self._pacer.safe_up_to(0)
        self._decision.anew()
        self._told, self._gave_up = Told(), False

    def _compare(self, store: Store) -> None:
        """Once: ranks that save elsewhere, or at other times, would wait for each other."""
        if not self._compared:
            self._compared = True
            check_saving_alike(self._world, str(store.address), self._policy)

    def _begin(self, store: Store, about: About) -> None:
        self._world.barrier("checkpoint()")  # meetings of saves don't see that a rank is elsewhere
        self._notices.before_save(store, saved=self.counts.saved)
        # The last save is waited for before this one begins: its failure costs this one nothing, and of many
        # ranks all learn of it here.
        self._ask_finished()
        if self._lost is not None:
            about = about.in_place_of(self._lost)
        state, self._lost, self._gave_up = self._state, None, False
        captured = self._captured(store.address)
        try:
            self._pending = store.save_in_background(
                captured.shared,
                per_rank=captured.own,
                step=state.step,
                epoch=state.progress.epoch,
                metrics=about.metrics,
                tags=about.tags,
                staging=self._staging,
                changing=state.changing(),
                steady=state.steady(),
                environment=self._environment(),
            )
        except (StoreError, BackgroundSaveError) as error:
            self._failed(error, about)
        state.gate.pending = self._pending
        self._slips.begun(state.step)
        self._about = about

    def _environment(self) -> dict[str, Any]:
        return {"saving": self._pacer.to_json(), **self._provenance()}

    def _captured(self, place: str | os.PathLike[str]) -> Captured:
        """What to save to a place, once the script's hooks have been asked."""
        captured = self._state.capture()
        return replace(captured, shared=self.hooks.before_save(self._state.models, captured.shared, place))

    def _ask_finished(self) -> None:
        """Ask what became of the last save in the background."""
        finished, self._pending = self._pending, None
        if finished is not None and not finished.inherited:
            try:
                finished.wait()
            except BackgroundSaveError as error:
                self._failed(error, self._about)
            else:
                self._complaints.saved()

    def _failed(self, error: StoreError | BackgroundSaveError, about: About) -> None:
        if is_of_changed_state(error):
            _log.warning(
                "%s. The checkpoint is made again, and from now on each is copied at once.", error.__cause__
            )
            self._staging, self._lost = "awaited", about
            self._pacer.redone()
            return
        if self._policy.on_error == "raise":
            raise error
        self._complaints.failed(error)

    def save(
        self,
        output_dir: str | os.PathLike[str] | None,
        *,
        metrics: Mapping[str, Any] | None,
        tags: Sequence[str],
        pinned: bool | None,
    ) -> Checkpoint:
        """Save now; durable on return."""
        self._state.check_steps()
        self._world.barrier("save_state()")
        if (problem := self.settle()) is not None:
            raise problem
        place = output_dir or self._require_store("save_state() without output_dir").address
        if output_dir is not None and not self._project.automatic_checkpoint_naming:
            check_saving_alike(self._world, os.fspath(output_dir))
        elif self._store is not None:
            self._compare(self._store)
        state, captured = self._state, self._captured(place)
        about: dict[str, Any] = {
            "per_rank": captured.own,
            "step": state.step,
            "epoch": state.progress.epoch,
            "metrics": metrics,
            "tags": tags,
            "environment": self._environment(),
        }
        if output_dir is not None and not self._project.automatic_checkpoint_naming:
            saved = save_directory(
                output_dir, captured.shared, pinned=bool(pinned), world=self._world, run=self.run, **about
            )
            self._pacer.saved_by_hand(state.step)
            return saved
        store = self._require_store("save_state() without output_dir")
        self._notices.before_save(store, saved=self.counts.saved)
        keep = self._pin_explicit if pinned is None else pinned
        saved = store.save(captured.shared, pinned=keep, **about)
        self._pacer.saved_by_hand(state.step)
        self._pacer.safe_up_to(state.step)
        self._gave_up = False
        return saved

    def load(self, input_dir: str | os.PathLike[str] | None) -> Checkpoint | None:
        """Restore a given checkpoint, or the newest valid automatic one.

        Returns:
            The checkpoint; None for a directory that Accelerate wrote.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if input_dir is None:
            store = self._require_store("load_state() without input_dir")
            loaded = self._restore(self._origins.newest_of(store))
            input_dir = newest_accelerate_state(self._project.checkpoints) if loaded is None else None
            if loaded is None and input_dir is None:
                raise CheckpointNotFoundError(
                    f"load_state() found no checkpoint in {store.address}. Use resume(), which returns None "
                    "on a first start, or pass input_dir."
                )
        if input_dir is None:
            return loaded
        if is_accelerate_state(input_dir):
            self._go_back(self._origins.of_accelerate(input_dir))
            return None
        # It may be the one that is being written.
        return self._go_back(self._origins.directory(input_dir, self._store))

    def _go_back(self, load: Callable[[Captured], _Loaded | None]) -> _Loaded | None:
        """Restore; what was done since the last checkpoint, and what later ones hold, is given up."""
        gives_up = self._gave_up or self.unsaved_steps > 0
        loaded = self._restore(load)
        # Only now have all ranks heard of what was being written.
        self._gave_up = self._store is not None and (gives_up or self.counts.saved > 0)
        return loaded

    def resume(self) -> Checkpoint | None:
        """Restore the newest valid automatic checkpoint; None if there is none."""
        store = self._require_store("resume()")
        if self._state.is_empty:
            raise NotPreparedError("resume() has nothing to restore into. Call prepare() first.")
        self._compare(store)
        with together(self._world, "claiming the store"):
            store.claim()  # whoever still writes there is named now, not at the first checkpoint
        loaded = self._restore(self._origins.newest_of(store))
        self._notices.resumed(store, loaded)
        if loaded is None:
            tell_of_earlier(self._project.checkpoints)
        return loaded

    def _restore(self, load: Callable[[Captured], _Loaded | None]) -> _Loaded | None:
        self._world.barrier("restoring a run")
        if (problem := self.settle()) is not None:
            raise problem
        loaded: _Loaded | None = self._state.restore(load)
        self._decision.anew()
        if loaded is not None:
            self._pacer.safe_up_to(self._state.step)
            self._gave_up = False
            self._told = Told()  # it was said of a step that may come again, and be another one
        return loaded

    def settle(self) -> BackgroundSaveError | None:
        """Wait, and return why the last checkpoint was not saved, if the policy is to raise it."""
        try:
            self.wait()
        except BackgroundSaveError as error:
            if self._policy.on_error == "raise":
                return error
            self._complaints.failed(error)
        return None

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises:
            BackgroundSaveError: a save in the background failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None and not pending.inherited:
            try:
                pending.wait()
            except BackgroundSaveError as error:
                if not is_of_changed_state(error):
                    raise
                self._failed(error, self._about)
        if self._store is not None:
            self._store.wait()
            if self._lost is not None:
                self._begin(self._store, About(metrics=self._told.at(self._state.step)))
                begun = self._pending is not None
                self.wait()
                if begun:
                    self._pacer.saved_by_hand(self._state.step)
                    self._pacer.safe_up_to(self._state.step)
