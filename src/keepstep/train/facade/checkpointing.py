"""Saving and restoring a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle

from keepstep.checkpoint.pending import PendingSave
from keepstep.checkpoint.version import Checkpoint
from keepstep.errors import UsageError
from keepstep.track.trackers import Origin
from keepstep.train.facade.base import Facade
from keepstep.train.pace.counts import CheckpointCounts
from keepstep.train.resuming.hooked import LoadHook, SaveHook

__all__ = ["Checkpointing"]


class Checkpointing(Facade):
    """Checkpoints: automatic ones, those made by hand, and what a run goes on from."""

    def resume(self) -> Checkpoint | None:
        """Restore everything from the newest valid automatic checkpoint. Call it after `prepare`.

        Returns:
            The checkpoint; None on a first start.

        Raises:
            MismatchError: it doesn't fit what was prepared; nothing was changed.
            NoValidCheckpointError: there are checkpoints, and all of them are damaged.
            UsageError: there is no project_dir, or nothing was prepared.
        """
        return self._logged(self._saver.resume(), goes_on=True)

    def checkpoint(
        self, metrics: Mapping[str, Any] | None = None, tags: Sequence[str] = ()
    ) -> PendingSave | None:
        """Save in the background if the policy says so. Call it after each optimizer step.

        A resumed run goes on with the next batch, so what follows this call in the loop's body is not run
        again: make it the last statement, and leave a loop that has done its steps before it, not after.

        Args:
            metrics: to find the best checkpoint by.
            tags: names; a tagged checkpoint is never deleted automatically.

        Returns:
            The save under way; None if none was due.

        Raises:
            BackgroundSaveError: an earlier save failed.
        """
        return self._saver.checkpoint(metrics, tags)

    @property
    def checkpoint_counts(self) -> CheckpointCounts:
        """How many checkpoints this process has saved, left out and waited for."""
        return self._saver.counts

    def wait_for_checkpoint(self) -> None:
        """Return once what `checkpoint()` began is durable.

        Raises:
            BackgroundSaveError: it failed.
        """
        self._saver.wait()

    def save_state(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        safe_serialization: bool = True,
        *,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        pinned: bool | None = None,
    ) -> str:
        """Save everything now; durable on return.

        Args:
            output_dir: the checkpoint's directory. None, or automatic naming, numbers it under `project_dir`.
            safe_serialization: only True: the other format is pickle.
            metrics: to find the best checkpoint by.
            tags: names; a tagged checkpoint is never deleted automatically.
            pinned: never delete it automatically. None: only if neither a policy nor a limit was given.

        Returns:
            The directory.

        Raises:
            UsageError: pickle was asked for.
        """
        if not safe_serialization:
            raise UsageError(
                "safe_serialization=False asks for weights in a pickle, and keepstep never writes one. Leave "
                "the argument out: load_state() reads what save_state() wrote"
            )
        return str(self._saver.save(output_dir, metrics=metrics, tags=tags, pinned=pinned).path)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: Mapping[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> Checkpoint | None:
        """Restore everything from a checkpoint.

        Args:
            input_dir: its directory, or one that Accelerate's `save_state` wrote; None for the newest valid
                automatic one, or if there is none, the last one that Accelerate wrote under `project_dir`.
            load_kwargs: of `torch.load`: `map_location` and `weights_only=True`, without effect, since values
                are read to where they belong and nothing is unpickled.
            load_model_func_kwargs: the same, and `strict=True`, which restoring always is.

        Returns:
            The checkpoint; None for a directory that Accelerate wrote.

        Raises:
            UsageError: an option with another meaning, such as `strict=False`.
            CheckpointNotFoundError: there is none.
            MismatchError: it doesn't fit what was prepared; nothing was changed.
        """
        _check_load_options({**(load_kwargs or {}), **load_model_func_kwargs})
        checkpoint = self._saver.load(input_dir)
        if checkpoint is not None:  # a checkpoint of Accelerate's knows no loops
            self._state.progress.go_back(kept=self._saver.keeps)
        self._logged(checkpoint, goes_on=False)
        return checkpoint

    def register_save_state_pre_hook(self, hook: SaveHook) -> RemovableHandle:
        """Call a hook before each save, by hand or automatic, on every rank.

        Args:
            hook: `hook(models, weights, output_dir)`. What it writes to the directory `output_dir` becomes
                part of the checkpoint. It may take weights out of the list to see to a model itself.

        Returns:
            A handle; its `remove()` takes the hook away.
        """
        return self._saver.hooks.on_save(hook)

    def register_load_state_pre_hook(self, hook: LoadHook) -> RemovableHandle:
        """Call a hook before each restore, on every rank.

        Args:
            hook: `hook(models, input_dir)`. The directory `input_dir` holds what hooks wrote when the
                checkpoint was saved. It may take models out of the list that it restores itself.

        Returns:
            A handle; its `remove()` takes the hook away.
        """
        return self._saver.hooks.on_load(hook)

    def end_training(self, *, finished: bool = False) -> None:
        """Wait for what is being saved, and close trackers. Call it at the end of a script.

        Args:
            finished: the run is done: the last steps are saved, unless a checkpoint holds them, with the
                metrics that `checkpoint()` was last given, so that the script may be started again without
                an effect. Where the loop over `epochs()` was left early
                (early stopping), it is done for good: when the script is started again and resumes,
                `epochs()` yields nothing; load an older checkpoint to train on. A run that had all its epochs
                goes on all the same if the script asks for more of them. Leave it False where a loop is left
                to be gone on with later, before a time limit, say.

        Raises:
            BackgroundSaveError: a save failed, and the policy says `on_error="raise"`. If `finished`, the
                last steps are saved all the same.
            UsageError: there is no project_dir to save into, or the script ends before the loop over
                `epochs()` in which the checkpoint was made that it went on from: nothing was trained.
        """
        try:
            problem = self._saver.settle()
            if finished:
                self._finish()
            self._saver.tell_what_is_unsaved()
            if problem is not None:
                raise problem
            self._state.progress.check_end()
        finally:
            self._trackers.finish()

    def _finish(self) -> None:
        progress = self._state.progress
        news = progress.finish()
        if news or self._saver.is_unsaved:
            try:
                self._saver.save_end()
            except BaseException:
                if news:
                    progress.unfinish()
                raise

    def _logged(self, checkpoint: Checkpoint | None, *, goes_on: bool) -> Checkpoint | None:
        """Tell the log what was loaded."""
        if checkpoint is None:
            self._trackers.start()
        else:
            manifest = checkpoint.manifest
            own = goes_on or self._saver.is_in_project(checkpoint)
            self._trackers.loaded(
                Origin(
                    run=manifest.run if own else None,
                    attempt=manifest.attempt,
                    log=manifest.environment.get("log", {}),
                ),
                goes_on=goes_on,
            )
        return checkpoint

    @property
    def project_dir(self) -> str | os.PathLike[str] | None:
        """Where the project keeps its files."""
        return self.project_configuration.project_dir

    @property
    def save_iteration(self) -> int:
        """Number of the next automatic checkpoint."""
        return self._saver.next_number


def _check_load_options(options: Mapping[str, Any]) -> None:
    """Let through what changes nothing here."""
    meant = {"strict": True, "weights_only": True}
    for name, value in options.items():
        if name != "map_location" and meant.get(name) is not value:
            raise UsageError(
                f"load_state({name}={value!r:.60}) asks for what keepstep does not do: it restores all of a "
                "checkpoint, to where values belong, and unpickles nothing. Allowed are map_location, "
                "strict=True and weights_only=True, without effect. For weights alone, or part of them, use "
                "load_checkpoint_in_model(model, path, strict=False)"
            )
