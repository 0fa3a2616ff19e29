"""The facade: names and meaning of Hugging Face Accelerate, and a run that goes on where it was killed.

It forwards to parts that `build.py` chose; nothing here asks which ones they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from keepstep.checkpoint.store import Store
from keepstep.checkpoint.version import Checkpoint, PendingSave
from keepstep.train.build import build_parts
from keepstep.train.config import (
    CheckpointPolicy,
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from keepstep.train.counts import CheckpointCounts
from keepstep.train.loader import skip_first_batches
from keepstep.train.preparing import Preparer
from keepstep.train.progress import Progress
from keepstep.train.saving import Saver
from keepstep.train.state import TrainState
from keepstep.train.step import AccumulationWindow, PreparedOptimizer, PreparedScheduler
from keepstep.world import Reduction

__all__ = ["Accelerator"]

T = TypeVar("T")


class Accelerator:
    """Runs a plain training loop so that its progress is never lost.

    Args:
        device_placement: put models and batches onto `device`.
        split_batches: with one process, without effect.
        mixed_precision: "no", "bf16" or "fp16"; None reads KEEPSTEP_MIXED_PRECISION, else "no".
        gradient_accumulation_steps: micro-batches to an optimizer step.
        cpu: train on the CPU even if there is an accelerator.
        project_dir: automatic checkpoints go to `project_dir/checkpoints/checkpoint_N`.
        project_config: more about the project's files.
        gradient_accumulation_plugin: more about accumulation, instead of `gradient_accumulation_steps`.
        step_scheduler_with_optimizer: schedulers step only when their optimizers do.
        dataloader_config: more about loaders.
        checkpoint_policy: when `checkpoint()` saves and what is kept. None saves as often as costs at most
            1 % of the run's time, keeps the 3 newest of those, and all that `save_state()` wrote.
        kwargs_handlers: `GradScalerKwargs`.

    Raises:
        UsageError: a value is not allowed, or two contradict each other.
    """

    def __init__(
        self,
        device_placement: bool = True,
        split_batches: bool = False,
        mixed_precision: str | None = None,
        gradient_accumulation_steps: int = 1,
        cpu: bool = False,
        project_dir: str | os.PathLike[str] | None = None,
        project_config: ProjectConfiguration | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        step_scheduler_with_optimizer: bool = True,
        dataloader_config: DataLoaderConfiguration | None = None,
        checkpoint_policy: CheckpointPolicy | None = None,
        kwargs_handlers: list[Any] | None = None,
    ) -> None:
        parts = build_parts(
            device_placement=device_placement,
            mixed_precision=mixed_precision,
            gradient_accumulation_steps=gradient_accumulation_steps,
            cpu=cpu,
            project_dir=project_dir,
            project_config=project_config,
            gradient_accumulation_plugin=gradient_accumulation_plugin,
            dataloader_config=dataloader_config,
            checkpoint_policy=checkpoint_policy,
            kwargs_handlers=kwargs_handlers,
        )
        self.device = parts.device
        self.project_configuration = parts.project
        self.split_batches = split_batches
        self._world = parts.world
        self._precision = parts.precision
        progress = Progress()
        self._window = AccumulationWindow(parts.accumulation, progress.at_last_batch)
        self._state = TrainState(
            precision=parts.precision, window=self._window, progress=progress, seed=parts.data_seed
        )
        self._preparer = Preparer(
            self._state,
            device=parts.device if device_placement else None,
            placement=parts.placement,
            step_with_optimizer=step_scheduler_with_optimizer,
        )
        place = parts.project.checkpoints
        self._saver = Saver(
            state=self._state,
            store=None
            if place is None
            else Store(
                place,
                mirror=parts.project.mirror,
                storage_options=parts.project.storage_options,
                retention=parts.retention,
                spare_other_runs=True,
                scrub_interval_s=parts.policy.scrub_interval_s,
                memory_budget_bytes=parts.policy.memory_budget_bytes,
            ),
            project=parts.project,
            policy=parts.policy,
            pin_explicit=parts.pin_explicit_saves,
        )

    # -- preparing ------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Prepare models, optimizers, DataLoaders and schedulers, in any order and number.

        Args:
            objects: anything of another type comes back as it is.

        Returns:
            The prepared object, or a tuple of them in the order given.
        """
        prepared = self._preparer.prepare(objects)
        return prepared[0] if len(prepared) == 1 else prepared

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move a model to the device and make it run in the run's precision."""
        return self._preparer.prepare_model(model)

    def prepare_optimizer(self, optimizer: Optimizer) -> PreparedOptimizer:
        """Make an optimizer step only when gradients are complete."""
        return self._preparer.prepare_optimizer(optimizer)

    def prepare_data_loader(self, data_loader: DataLoader[Any]) -> DataLoader[Any]:
        """Make a DataLoader's order exact and resumable."""
        return self._preparer.prepare_loader(data_loader)

    def prepare_scheduler(self, scheduler: LRScheduler) -> PreparedScheduler:
        """Make a scheduler step only when its optimizers do. Prepare those first."""
        return self._preparer.prepare_scheduler(scheduler)

    def register_for_checkpointing(self, *objects: Any) -> None:
        """Save and restore further objects that have `state_dict` and `load_state_dict`.

        Raises:
            UsageError: naming those that lack them.
        """
        self._state.register(objects)

    def unwrap_model(self, model: torch.nn.Module, keep_fp32_wrapper: bool = True) -> torch.nn.Module:
        """Return the module behind a prepared or compiled one.

        Args:
            model: prepared or not.
            keep_fp32_wrapper: False also undoes what mixed precision did to its forward.
        """
        return self._preparer.unwrap_model(model, keep_precision=keep_fp32_wrapper)

    def free_memory(self, *objects: Any) -> tuple[None, ...]:
        """Finish saving and let go of everything that was prepared.

        Returns:
            One None for each argument, to assign to its names.
        """
        self._saver.wait()
        self._preparer.clear()
        return tuple(None for _ in objects)

    clear = free_memory

    # -- training -------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients of a loss, divided by the number of micro-batches in a window."""
        window = self._window
        if window.num_steps > 1:
            loss = loss / window.num_steps
        for optimizer in self._state.optimizers:
            optimizer.note_backward()
        self._precision.scale(loss).backward(**kwargs)  # type: ignore[no-untyped-call]

    def accumulate(self, *models: torch.nn.Module) -> AbstractContextManager[None]:
        """A context for one micro-batch: inside, optimizers step only at the end of a window.

        A window ends after `gradient_accumulation_steps` micro-batches, and at a loader's last batch.
        """
        return self._window

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """A context in which ranks don't exchange gradients."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which computation runs in the run's precision; prepared models do so by themselves."""
        return self._precision.autocast()

    def clip_grad_norm_(
        self, parameters: Any, max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor | None:
        """Clip the norm of complete gradients, at their true size.

        Returns:
            The norm before clipping; None inside an accumulation window, where nothing is clipped.
        """
        if not self._window.sync_gradients:
            return None
        parameters = self._unscale(parameters)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip each element of complete gradients, at their true size."""
        if self._window.sync_gradients:
            parameters = self._unscale(parameters)
            torch.nn.utils.clip_grad_value_(parameters, clip_value)

    def _unscale(self, parameters: Any) -> list[torch.Tensor]:
        """Bring gradients to their true size: those of the optimizers that own one of the parameters.

        Others may have gradients that no step is going to use, such as a critic's in its adversary's step.
        """
        clipped = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        numbers = {id(parameter) for parameter in clipped}
        for prepared in self._state.optimizers:
            if prepared.pending and any(id(parameter) in numbers for parameter in prepared.parameters()):
                self._precision.unscale(prepared.optimizer)
        return clipped

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epochs of 0 to count - 1 that are still to run."""
        return self._state.progress.epochs(count)

    @staticmethod
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        """See `keepstep.skip_first_batches`."""
        return skip_first_batches(dataloader, num_batches)

    # -- saving and restoring -------------------------------------------------------------------------

    def resume(self) -> Checkpoint | None:
        """Restore everything from the newest valid automatic checkpoint. Call it after `prepare`.

        Returns:
            The checkpoint; None on a first start.

        Raises:
            MismatchError: it doesn't fit what was prepared; nothing was changed.
            NoValidCheckpointError: there are checkpoints, and all of them are damaged.
            UsageError: there is no project_dir, or nothing was prepared.
        """
        return self._saver.resume()

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
        *,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        pinned: bool | None = None,
    ) -> str:
        """Save everything now; durable on return.

        Args:
            output_dir: the checkpoint's directory. None, or automatic naming, numbers it under `project_dir`.
            metrics: to find the best checkpoint by.
            tags: names; a tagged checkpoint is never deleted automatically.
            pinned: never delete it automatically. None: only if neither a policy nor a limit was given.

        Returns:
            The directory.
        """
        return str(self._saver.save(output_dir, metrics=metrics, tags=tags, pinned=pinned).path)

    def load_state(self, input_dir: str | os.PathLike[str] | None = None) -> Checkpoint:
        """Restore everything from a checkpoint.

        Args:
            input_dir: its directory; None for the newest valid automatic one.

        Raises:
            CheckpointNotFoundError: there is none.
            MismatchError: it doesn't fit what was prepared; nothing was changed.
        """
        return self._saver.load(input_dir)

    def end_training(self, *, finished: bool = False) -> None:
        """Wait for what is being saved. Call it at the end of a script.

        Args:
            finished: the run is done for good, even where the loop over `epochs()` was left early (early
                stopping). In that case a checkpoint is saved, and when the script is started again and
                resumes, `epochs()` yields nothing; load an older checkpoint to train on. A run that had all
                its epochs goes on all the same if the script asks for more of them. Leave it False where a
                loop is left to be gone on with later, before a time limit, say.

        Raises:
            BackgroundSaveError: a save failed.
            UsageError: there is no project_dir to save into.
        """
        self._saver.wait()
        if finished and self._state.progress.finish():
            self._saver.save(None, metrics=None, tags=(), pinned=None)
        self._saver.tell_what_is_unsaved()

    # -- ranks ----------------------------------------------------------------------------------------

    def wait_for_everyone(self) -> None:
        """Return once every rank has called this."""
        self._world.barrier()

    def gather(self, tensor: T) -> T:
        """Concatenate tensors of all ranks."""
        return self._world.gather(tensor)

    def gather_for_metrics(self, input_data: T, use_gather_object: bool = False) -> T:
        """Gather what an evaluation computed, without samples that fill up the last batch."""
        return self._world.gather(input_data)

    def reduce(self, tensor: T, reduction: Reduction = "sum") -> T:
        """Combine tensors of all ranks."""
        return self._world.reduce(tensor, reduction)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Let the main process run a block before the others do."""
        if not self.is_main_process:
            self._world.barrier()
        yield
        if self.is_main_process:
            self._world.barrier()

    local_main_process_first = main_process_first

    def on_main_process(self, function: Callable[..., T]) -> Callable[..., T | None]:
        """Decorate a function to run on the main process only."""

        def only_there(*args: Any, **kwargs: Any) -> T | None:
            return function(*args, **kwargs) if self.is_main_process else None

        return only_there

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print once on each machine."""
        if self.is_local_main_process:
            print(*args, **kwargs)  # noqa: T201 (what the method is for)

    @property
    def num_processes(self) -> int:
        """How many ranks train together."""
        return self._world.size

    @property
    def process_index(self) -> int:
        """This rank's number."""
        return self._world.rank

    @property
    def local_process_index(self) -> int:
        """This rank's number on its machine."""
        return self._world.local_rank

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0."""
        return self._world.rank == 0

    @property
    def is_local_main_process(self) -> bool:
        """Whether this is the first rank on its machine."""
        return self._world.local_rank == 0

    @property
    def is_last_process(self) -> bool:
        """Whether this is the last rank."""
        return self._world.rank == self._world.size - 1

    @property
    def distributed_type(self) -> str:
        """Accelerate's name for how ranks work together."""
        return self._world.kind

    # -- what is going on -----------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done; with several optimizers, those of the one that did most."""
        return self._state.step

    @property
    def epoch(self) -> int | None:
        """The epoch that `epochs()` yielded last; None without it."""
        return self._state.progress.epoch

    @property
    def sync_gradients(self) -> bool:
        """Whether this micro-batch completes an optimizer step."""
        return self._window.sync_gradients

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches to an optimizer step."""
        return self._window.num_steps

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether gradients overflowed at the last step of some optimizer (fp16)."""
        return any(optimizer.step_was_skipped for optimizer in self._state.optimizers)

    @property
    def mixed_precision(self) -> str:
        """One of "no", "bf16" and "fp16"."""
        return self._precision.name

    @property
    def project_dir(self) -> str | os.PathLike[str] | None:
        """Where the project keeps its files."""
        return self.project_configuration.project_dir

    @property
    def logging_dir(self) -> str | os.PathLike[str] | None:
        """Where trackers write."""
        return self.project_configuration.logging_dir

    @property
    def save_iteration(self) -> int:
        """Number of the next automatic checkpoint."""
        return self._saver.next_number
