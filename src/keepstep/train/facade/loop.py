"""The training loop: forward, backward, accumulation, clipping, epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from keepstep.train.facade.base import Facade
from keepstep.train.loader import skip_first_batches

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
