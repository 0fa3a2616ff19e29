"""Local SGD: ranks step on their own, and average their parameters every so many steps.

From Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019 (https://arxiv.org/abs/1805.09767).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from keepstep.errors import UsageError
from keepstep.train.accelerator import Accelerator
from keepstep.train.ranks.process import DistributedType

__all__ = ["LocalSGD"]

_AT_ONCE_BYTES = 64 << 20
"""Parameters that are averaged in one go; their sums take as much memory again."""


class LocalSGD:
    """A context in which ranks don't exchange gradients, but average their parameters every few steps.

    Call `step()` after each optimizer step. On leaving the context, parameters are averaged once more. The
    optimizer's own state (momentum) stays each rank's. Between two averages `checkpoint()` saves nothing, as
    there is no one state of all ranks, and `save_state()` raises UsageError.

    Args:
        accelerator: that prepared the model.
        model: the prepared model.
        local_sgd_steps: optimizer steps from one average to the next.
        enabled: False, as one process, makes it do nothing.

    Raises:
        UsageError: the model's parameters are sharded, or `local_sgd_steps` is no positive integer.
    """

    def __init__(
        self, accelerator: Accelerator, model: torch.nn.Module, local_sgd_steps: int, enabled: bool = True
    ) -> None:
        if isinstance(local_sgd_steps, bool) or not isinstance(local_sgd_steps, int) or local_sgd_steps < 1:
            raise UsageError(f"local_sgd_steps is {local_sgd_steps!r}; expected an integer of at least 1")
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UsageError(
                "LocalSGD needs the whole model on each rank, and here its parameters are sharded (FSDP). "
                "Train without the fsdp_plugin, or leave LocalSGD out"
            )
        self.accelerator = accelerator
        self.model = model
        self.local_sgd_steps = local_sgd_steps
        self.enabled = enabled and accelerator.use_distributed
        self.num_steps = 0
        self._open = ExitStack()

    def __enter__(self) -> Self:
        if self.enabled:
            self._open.enter_context(self.accelerator.no_sync(self.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if self.enabled and error is None:
                self._average()

    def step(self) -> None:
        """Count an optimizer step; average parameters if it is time."""
        self.num_steps += 1
        if not self.enabled:
            return
        if self.num_steps % self.local_sgd_steps == 0:
            self._average()
        else:
            self.accelerator._state.ranks_apart = "within LocalSGD, between two averages"

    def _average(self) -> None:
        state = self.accelerator._state
        state.gate.wait()  # a checkpoint may still be copying what is written here
        for tensors in self._portions():
            means = self.accelerator.reduce(tensors, "mean")
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean)
        state.ranks_apart = ""

    def _portions(self) -> Iterator[list[torch.Tensor]]:
        portion: list[torch.Tensor] = []
        for parameter in self.model.parameters():
            portion.append(parameter.detach())
            if sum(tensor.nbytes for tensor in portion) >= _AT_ONCE_BYTES:
                yield portion
                portion = []
        yield portion
