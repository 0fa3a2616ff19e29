"""The training loop: forward, backward, accumulation, clipping, epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from keepstep.errors import UsageError
from keepstep.train.data.loader import skip_first_batches
from keepstep.train.facade.base import Facade
from keepstep.train.resuming.evening import even_out
from keepstep.train.settings.plugins import AutocastKwargs, ProfileKwargs
from keepstep.world.standstill import backwards

__all__ = ["Loop"]


class Loop(Facade):
    """What a loop calls at each batch."""

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Compute gradients of a loss, divided by the number of micro-batches in a window."""
        window = self._window
        if window.num_steps > 1:
            loss = loss / window.num_steps
        for optimizer in self._state.optimizers:
            optimizer.note_backward()
        backwards.begun += window.sync_gradients or window.sync_each_batch
        backwards.inside = True
        try:
            self._precision.scale(loss).backward(**kwargs)  # type: ignore[no-untyped-call]
        finally:
            backwards.inside = False

    def accumulate(self, *models: torch.nn.Module) -> AbstractContextManager[None]:
        """A context for one micro-batch: inside, optimizers step only at the end of a window.

        A window ends after `gradient_accumulation_steps` micro-batches, and at a loader's last batch. Ranks
        exchange the gradients of these models at its end only.
        """
        if self._world.size == 1 or self._window.sync_each_batch:
            return self._window
        return self._window_of(models)

    @contextmanager
    def _window_of(self, models: tuple[torch.nn.Module, ...]) -> Iterator[None]:
        with self._window, ExitStack() as unfinished:
            if not self._window.sync_gradients:
                for model in models:
                    unfinished.enter_context(self._parallel.no_sync(model))
            yield

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """A context in which ranks don't exchange a model's gradients: forward and backward belong inside."""
        return self._parallel.no_sync(model)

    def trigger_sync_in_backward(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """A context for a backward that exchanges gradients although its forward ran in `no_sync`."""
        return self._parallel.sync_next_backward(model)

    @contextmanager
    def join_uneven_inputs(self, joinables: list[Any], even_batches: bool | None = None) -> Iterator[None]:
        """A context in which ranks may have different numbers of batches.

        A rank that has none left takes part in the others' exchanges until all are through. It can't take
        part in saving: checkpoints are made after the block, or with `even_batches=True`. After the block all
        ranks go on with the optimizers, schedulers and loss scale of the one that had most batches.

        Args:
            joinables: prepared models.
            even_batches: for passes that begin inside, instead of what the loaders were prepared with; True
                gives ranks equal numbers of batches, so that there is nothing to do.

        Raises:
            UsageError: a model is sharded.
        """
        with ExitStack() as inside:
            if even_batches is not None:
                for loader in self._state.loaders:
                    inside.callback(setattr, loader, "even_batches", loader.even_batches)
                    loader.even_batches = even_batches
            if not even_batches and self._world.size > 1:
                inside.callback(setattr, self._state, "steps_differ", self._state.steps_differ)
                self._state.steps_differ = True
            if not even_batches:
                inside.enter_context(self._parallel.join(joinables))
            yield
        if not even_batches and self._world.size > 1:
            even_out(self._state)

    def autocast(self, autocast_handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """A context in which computation runs in the run's precision; prepared models do so by themselves.

        Args:
            autocast_handler: how it is entered; None for what the Accelerator was given.
        """
        return self._precision.autocast(autocast_handler)

    @contextmanager
    def profile(self, profile_handler: ProfileKwargs | None = None) -> Iterator[torch.profiler.profile]:
        """Profile the block.

        Args:
            profile_handler: how; None for what the Accelerator was given. With `output_trace_dir` each rank
                writes `profile_RANK.json` there.
        """
        handler = profile_handler or self._parts.profiling
        with handler.build() as profiler:
            yield profiler
        if handler.output_trace_dir is not None:
            directory = Path(handler.output_trace_dir)
            directory.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(directory / f"profile_{self._world.rank}.json"))
            self._world.barrier()

    def clip_grad_norm_(
        self, parameters: Any, max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor | None:
        """Clip the norm of complete gradients, at their true size.

        Returns:
            The norm before clipping; None inside an accumulation window, where nothing is clipped.
        """
        if not self._window.sync_gradients:
            return None
        return self._parallel.clip_norm(self._unscale(parameters), max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Clip each element of complete gradients, at their true size."""
        if self._window.sync_gradients:
            parameters = self._unscale(parameters)
            torch.nn.utils.clip_grad_value_(parameters, clip_value)

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Bring gradients to their true size (fp16); clipping does so by itself.

        Args:
            optimizer: a prepared one, or several; None for all.
        """
        for prepared in self._state.optimizers:
            wanted = optimizer is None or prepared is optimizer or prepared.optimizer is optimizer
            if wanted or (isinstance(optimizer, list | tuple) and any(prepared is one for one in optimizer)):
                self._precision.unscale(prepared.optimizer)

    def _unscale(self, parameters: Any) -> list[torch.Tensor]:
        """Bring gradients to their true size: those of the optimizers that own one of the parameters.

        Others may have gradients that no step is going to use, such as a critic's in its adversary's step.
        """
        clipped = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        pending = (prepared.optimizer for prepared in self._state.optimizers if prepared.pending)
        self._precision.unscale_owners(pending, clipped)
        return clipped

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the epochs of 0 to count - 1 that are still to run."""
        return self._state.progress.epochs(count)

    @staticmethod
    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        """See `keepstep.skip_first_batches`."""
        return skip_first_batches(dataloader, num_batches)

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

    @sync_gradients.setter
    def sync_gradients(self, complete: bool) -> None:
        self._window.sync_gradients = complete

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches to an optimizer step."""
        return self._window.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UsageError(f"gradient_accumulation_steps={steps!r}; it must be an integer of at least 1.")
        self._window.num_steps = steps

    @property
    def dispatch_batches(self) -> bool | None:
        """See `DataLoaderConfiguration`."""
        return self._parts.loading.dispatch_batches

    @property
    def even_batches(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self._parts.loading.even_batches

    @property
    def use_seedable_sampler(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self._parts.loading.use_seedable_sampler

    @property
    def non_blocking(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self._parts.loading.non_blocking

    @property
    def use_stateful_dataloader(self) -> bool:
        """See `DataLoaderConfiguration`."""
        return self._parts.loading.use_stateful_dataloader

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether gradients overflowed at the last step of some optimizer (fp16)."""
        return any(optimizer.step_was_skipped for optimizer in self._state.optimizers)

    @property
    def mixed_precision(self) -> str:
        """One of "no", "bf16" and "fp16"."""
        return self._precision.name
