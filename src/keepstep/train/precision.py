"""In which precision a model runs, and what that asks of the backward pass and the optimizer's step.

`FullPrecision` is the whole of the seam with nothing to do in it; the other two replace what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from keepstep.errors import UsageError
from keepstep.train.settings.plugins import AutocastKwargs

__all__ = ["BFloat16", "Float16", "FullPrecision", "Precision"]


class Precision:
    """Everything in the precision of the model's own parameters."""

    name = "no"
    dtype: torch.dtype | None = None

    def autocast(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """A context in which a forward pass runs.

        Args:
            handler: how it is entered this time; None for how the run does.
        """
        return nullcontext()

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Make the model run in this precision when it is called."""
        return model

    def restore_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Undo `prepare_model`."""
        if isinstance(model.__dict__.get("forward"), _AutocastForward):
            model.forward = model.__dict__["forward"].forward
        return model

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to call `backward` on."""
        return loss

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients of an optimizer to their true size, once a step."""

    def unscale_owners(self, optimizers: Iterable[Optimizer], parameters: Sequence[torch.Tensor]) -> None:
        """As `unscale`, for each optimizer that steps one of the parameters."""

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Step an optimizer; return its result and whether it changed the parameters."""
        return (optimizer.step() if closure is None else optimizer.step(closure)), True

    def check_capturable(self) -> None:
        """Raise UsageError if the state of this instant could not be restored."""

    def state_dict(self) -> dict[str, Any] | None:
        """Plain values that a resumed run needs, None if there are none."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class FullPrecision(Precision):
    """`mixed_precision="no"`."""


class BFloat16(Precision):
    """`mixed_precision="bf16"`: the forward pass in bfloat16 where torch deems it safe, outputs in float32.

    Args:
        device_type: such as "cpu" or "cuda".
        autocasting: how autocast is entered.
    """

    name = "bf16"
    dtype = torch.bfloat16

    def __init__(self, device_type: str, autocasting: AutocastKwargs) -> None:
        self._device_type = device_type
        self._autocasting = autocasting

    def autocast(self, handler: AutocastKwargs | None = None) -> AbstractContextManager[Any]:
        """A context in which a forward pass runs."""
        how = handler or self._autocasting
        return torch.autocast(
            self._device_type, dtype=self.dtype, enabled=how.enabled, cache_enabled=how.cache_enabled
        )

    def prepare_model(self, model: torch.nn.Module) -> torch.nn.Module:
        """Make the model run in this precision when it is called."""
        # On the instance, so that the module's class, names and state dict stay as they are.
        model.forward = _AutocastForward(model.forward, self.autocast)
        return model


class Float16(BFloat16):
    """`mixed_precision="fp16"`: as bf16, with the loss scaled so that small gradients don't vanish.

    The scale is adjusted once an iteration, at the first backward after a step, as several optimizers may
    share one backward pass. What is saved in between is the scale as it will be after that.

    Args:
        device_type: such as "cpu" or "cuda".
        autocasting: how autocast is entered.
        scaler_options: arguments of `torch.amp.GradScaler`.
    """

    name = "fp16"
    dtype = torch.float16

    def __init__(self, device_type: str, autocasting: AutocastKwargs, scaler_options: dict[str, Any]) -> None:
        super().__init__(device_type, autocasting)
        self.scaler = torch.amp.GradScaler(device_type, **scaler_options)
        self._unscaled: set[int] = set()
        self._stepped: set[int] = set()
        self._interrupted: set[int] = set()
        self._skipped = False

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to call `backward` on."""
        self._forget_interrupted()
        if self._stepped:
            self._update()
        return self.scaler.scale(loss)

    def _forget_interrupted(self) -> None:
        """Of a step that did not come to its end the scaler knows that its gradients have their true size."""
        for number in self._interrupted:
            self.scaler._per_optimizer_states.pop(number, None)
            self._unscaled.discard(number)
        self._interrupted.clear()

    def _update(self) -> None:
        self.scaler.update()
        self._stepped.clear()
        self._unscaled.clear()
        self._skipped = False

    def unscale(self, optimizer: Optimizer) -> None:
        """Bring the gradients of an optimizer to their true size, once a step."""
        if self.scaler.is_enabled() and id(optimizer) not in self._unscaled | self._stepped:
            self.scaler.unscale_(optimizer)
            self._unscaled.add(id(optimizer))

    def unscale_owners(self, optimizers: Iterable[Optimizer], parameters: Sequence[torch.Tensor]) -> None:
        """As `unscale`, for each optimizer that steps one of the parameters."""
        numbers = {id(parameter) for parameter in parameters}
        for optimizer in optimizers:
            if any(id(mine) in numbers for group in optimizer.param_groups for mine in group["params"]):
                self.unscale(optimizer)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Step an optimizer unless its gradients overflowed."""
        if closure is not None:
            raise UsageError(
                "optimizer.step() got a closure, which mixed_precision='fp16' cannot run since the gradients "
                "have to be checked before the step. Use mixed_precision='bf16' or 'no' with this optimizer."
            )
        if id(optimizer) in self._stepped:
            self._update()
        if not self.scaler.is_enabled():
            return self.scaler.step(optimizer), True
        # Fused optimizers are called whatever was found, and leave the step out themselves. For the others
        # the scaler reads what was found before the step; read after it, it would be waited for once more.
        fused = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._interrupted.add(id(optimizer))  # should anything raise
        if not fused and self.scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.READY:
            self.scaler.unscale_(optimizer)
        overflow = not fused and self._overflowed(optimizer)
        result = self.scaler.step(optimizer)
        self._unscaled.discard(id(optimizer))
        self._stepped.add(id(optimizer))
        self._interrupted.discard(id(optimizer))
        overflow = overflow or (fused and self._overflowed(optimizer))
        self._skipped |= overflow
        return result, not overflow

    def _overflowed(self, optimizer: Optimizer) -> bool:
        """Whether gradients are not finite. The device is waited for."""
        found = self.scaler._found_inf_per_device(optimizer)
        return any(bool(inf.item()) for inf in found.values())

    def check_capturable(self) -> None:
        """Raise UsageError if the state of this instant could not be restored."""
        if self._unscaled:
            raise UsageError(
                "A checkpoint was asked for between clip_grad_norm_() or clip_grad_value_() and "
                "optimizer.step(), while gradients are unscaled (mixed_precision='fp16'). Call it after "
                "optimizer.step()."
            )

    def state_dict(self) -> dict[str, Any]:
        """The loss scale as it will be at the next backward."""
        state: dict[str, Any] = self.scaler.state_dict()
        return _adjusted(state, overflow=self._skipped) if state and self._stepped else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._forget_interrupted()
        if self._stepped or self._unscaled:
            # The scaler keeps a record of each step since its last update; none of them counts any more.
            self._update()
        if state:
            self.scaler.load_state_dict(state)


def _adjusted(state: dict[str, Any], *, overflow: bool) -> dict[str, Any]:
    """What `GradScaler.update` would make of a state, without touching the scaler."""
    scale, tracker = state["scale"], state["_growth_tracker"]
    if overflow:
        return {**state, "scale": _as_float32(scale * state["backoff_factor"]), "_growth_tracker": 0}
    tracker += 1
    if tracker == state["growth_interval"]:
        grown = _as_float32(scale * state["growth_factor"])
        scale, tracker = (grown if grown != float("inf") else scale), 0
    return {**state, "scale": scale, "_growth_tracker": tracker}


def _as_float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


class _AutocastForward:
    """A module's forward under autocast, with outputs in float32."""

    def __init__(
        self, forward: Callable[..., Any], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.forward = forward
        self._autocast = autocast

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._autocast():
            output = self.forward(*args, **kwargs)
        return _in_float32(output)


def _in_float32(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_in_float32(item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_in_float32(item) for item in value)
    if isinstance(value, dict):
        return _mapping_in_float32(value)
    return value


def _mapping_in_float32(value: dict[Any, Any]) -> dict[Any, Any]:
    # Model outputs are often dicts with attributes of their own: changed in place, they stay what they are.
    for key, item in list(value.items()):
        value[key] = _in_float32(item)
    return value
