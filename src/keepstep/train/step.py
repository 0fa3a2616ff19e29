"""When gradients are complete, and what `step()` of a prepared optimizer or scheduler does then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from keepstep.train.gate import StagingGate
from keepstep.train.precision import Precision
from keepstep.train.settings.config import GradientAccumulationPlugin

__all__ = ["AccumulationWindow", "PreparedOptimizer", "PreparedScheduler"]


class AccumulationWindow:
    """Counts micro-batches and says whether this one completes an optimizer step.

    Attributes:
        num_steps: micro-batches of a window; another number holds for the window that is open, too.
        sync_gradients: the present micro-batch completes the window; True outside of `accumulate()`.

    Args:
        plugin: length of the window and when to close it early.
        at_last_batch: whether the present batch is the last one of its loader.
    """

    def __init__(self, plugin: GradientAccumulationPlugin, at_last_batch: Callable[[], bool]) -> None:
        self.num_steps = plugin.num_steps
        self.sync_each_batch = plugin.sync_each_batch
        self.adjust_scheduler = plugin.adjust_scheduler
        self.sync_gradients = True
        self._with_loader = plugin.sync_with_dataloader
        self._at_last_batch = at_last_batch
        self._micro_batches = 0

    def __enter__(self) -> None:
        self._micro_batches += 1
        at_end = self._with_loader and self._at_last_batch()
        self.sync_gradients = at_end or self._micro_batches >= self.num_steps
        if self.sync_gradients:
            self._micro_batches = 0

    def __exit__(self, *failure: object) -> None:
        """Leave `sync_gradients` as it is: code after the block asks for it."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the window."""
        return {
            "micro_batches": self._micro_batches,
            "num_steps": self.num_steps,
            "sync": self.sync_gradients,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._micro_batches, self.sync_gradients = state["micro_batches"], state["sync"]


class PreparedOptimizer(Optimizer):
    """An optimizer whose `step` and `zero_grad` do nothing until gradients are complete.

    Attributes:
        optimizer: the one that was prepared.
        steps_done: steps that changed the parameters.
        step_was_skipped: the last step was left out, as gradients had overflowed (fp16).
        pending: `backward` was called since the last step.

    Args:
        optimizer: the user's.
        window: says when gradients are complete.
        precision: how to step.
        gate: where steps wait for what is copied in the background.
        before_first_step: called with `optimizer`, once.
        before_step: called whenever `step` is.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        window: AccumulationWindow,
        precision: Precision,
        gate: StagingGate,
        before_first_step: Callable[[Optimizer], None],
        before_step: Callable[[], None],
    ) -> None:
        # Optimizer.__init__ is left out on purpose: parameters and state are those of the wrapped one, and
        # schedulers only want to see an Optimizer.
        self.optimizer = optimizer
        self.steps_done = 0
        self.step_was_skipped = False
        self.pending = False
        self._window = window
        self._spent = False
        self._clears: bool | None = None
        self._precision = precision
        self._gate = gate
        self._before_first_step: Callable[[Optimizer], None] | None = before_first_step
        self._before_step = before_step

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step if gradients are complete and did not overflow; otherwise do nothing."""
        self._before_step()
        if not self._window.sync_gradients:
            self.pending = True
            return None
        if self._before_first_step is not None:
            self._before_first_step(self.optimizer)
            self._before_first_step = None
        self._gate.wait()
        result, changed = self._precision.step(self.optimizer, closure)
        self.step_was_skipped = not changed
        self.steps_done += changed
        self.pending = False
        self._spent = True
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients if they are complete; otherwise do nothing."""
        if self._window.sync_gradients:
            self.optimizer.zero_grad(set_to_none=set_to_none)
            self.pending = False
            if self._spent:
                # Gradients that stay as zeros are there at the next step, those set to None are not.
                self._spent, self._clears = False, set_to_none and self._clears is not False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the wrapped optimizer."""
        self._gate.wait()
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> None:
        """Switch optimizers that tell training from evaluation (schedule-free ones) to training."""
        switch = getattr(self.optimizer, "train", None)
        if switch is not None:
            self._gate.wait()
            switch()

    def eval(self) -> None:
        """Switch optimizers that tell training from evaluation to evaluation."""
        switch = getattr(self.optimizer, "eval", None)
        if switch is not None:
            self._gate.wait()
            switch()

    def __repr__(self) -> str:
        return f"PreparedOptimizer({self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    @property
    def has_spent_gradients(self) -> bool:
        """Whether a checkpoint can do without the gradients that are there.

        A step has used them, and this script clears what a step has used before it adds to it.
        """
        return self._spent and self._clears is True

    def note_backward(self) -> None:
        """Note that gradients are about to be added to those that are there."""
        if self._spent and any(parameter.grad is not None for parameter in self.parameters()):
            self._clears = False
        self._spent, self.pending = False, True

    def forget_gradients(self, *, pending: bool) -> None:
        """Note that gradients were replaced by those of a checkpoint."""
        self._spent, self.pending = False, pending

    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters, in the order of the parameter groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


class PreparedScheduler:
    """A scheduler that steps only when its optimizers really stepped.

    Args:
        scheduler: the user's.
        optimizers: those it depends on.
        window: says when gradients are complete.
        step_with_optimizer: False for a scheduler that is stepped regardless of optimizers.
        times: steps of it to each step of an optimizer.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        optimizers: Sequence[PreparedOptimizer],
        window: AccumulationWindow,
        step_with_optimizer: bool = True,
        times: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self._times = times
        self.optimizers = list(optimizers)
        self.step_with_optimizer = step_with_optimizer
        self._window = window

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Step unless gradients are incomplete or an optimizer skipped its step."""
        if self.step_with_optimizer:
            if not self._window.sync_gradients:
                if self._window.adjust_scheduler and hasattr(self.scheduler, "_step_count"):
                    self.scheduler._step_count += 1
                return
            for optimizer in self.optimizers:
                if optimizer.step_was_skipped:
                    return
            if self._times > 1:
                for _ in range(self._times):
                    if not self._is_through():
                        self.scheduler.step(*args, **kwargs)
                return
        self.scheduler.step(*args, **kwargs)

    def _is_through(self) -> bool:
        """Whether it has made all its steps; the last batch may be of fewer ranks than others."""
        total = getattr(self.scheduler, "total_steps", None)
        return total is not None and self.scheduler._step_count > total

    def state_dict(self) -> dict[str, Any]:
        """The wrapped scheduler's."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load into the wrapped scheduler."""
        self.scheduler.load_state_dict(state_dict)
