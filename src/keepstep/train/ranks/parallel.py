"""How the ranks share one model: not at all, or by equal copies (DDP); `shards.py` has the third way.

`Alone` is the whole of the seam with nothing to do in it; the other two replace what differs.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.nn import parallel as torch_parallel
from torch.optim import Optimizer

from keepstep.train.precision import FullPrecision
from keepstep.train.ranks.process import DistributedType
from keepstep.train.settings.plugins import DistributedDataParallelKwargs

__all__ = [
    "Alone",
    "Copies",
    "Parallel",
    "extract_model_from_parallel",
    "gradient_like",
    "is_compiled_module",
    "is_peft_model",
    "part_here",
    "without_wrappers",
]


class DistributedDataParallel(torch_parallel.DistributedDataParallel):
    """DDP whose gradients travel in the same buckets from the first backward on.

    DDP itself begins with buckets in the order in which parameters were registered, last ones first, and
    sorts them anew after the first backward, in the order in which gradients came. With more than two ranks
    the order decides how sums are rounded, so that the first step after a resume would differ from what it
    would have been in a run that was never interrupted. Here the first order stays.
    """

    def _build_params_for_reducer(self) -> tuple[list[torch.nn.Parameter], list[bool]]:
        parameters, are_sparse = super()._build_params_for_reducer()  # type: ignore[no-untyped-call]
        return parameters[::-1], are_sparse[::-1]

    def settle(self) -> None:
        """Sort the buckets now, by the order of the reducer's parameters, instead of after a backward."""
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()


class Parallel:
    """One process: models are as they are."""

    def __init__(self, kind: DistributedType) -> None:
        self.kind = kind

    def wrap(self, model: torch.nn.Module, device: torch.device | None) -> torch.nn.Module:
        """Return what the training loop calls.

        Args:
            model: on its device.
            device: which that is; None if the user sees to it.
        """
        return model

    def adopt(self, optimizer: Optimizer) -> None:
        """Let an optimizer that was made before `wrap` step what that put in place of its parameters."""

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """A context in which backward passes leave gradients to each rank."""
        return nullcontext()

    def sync_next_backward(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        """A context in which a backward pass exchanges gradients though its forward ran in `no_sync`."""
        return nullcontext()

    def clip_norm(self, parameters: Sequence[torch.Tensor], most: float, kind: float) -> torch.Tensor:
        """Clip the norm of all gradients together; return what it was."""
        return torch.nn.utils.clip_grad_norm_(parameters, most, norm_type=kind)

    def join(self, joinables: Sequence[Any]) -> AbstractContextManager[Any]:
        """A context in which ranks that run out of batches shadow the collectives of the others."""
        return nullcontext()

    def place_state(self, optimizer: Optimizer) -> None:
        """Bring the state of an optimizer to where its parameters are, after it was loaded."""

    def check_capturable(self, models: Sequence[torch.nn.Module], inside_window: bool) -> None:
        """Raise UsageError if the gradients of this instant could not be saved."""

    def compression_of(self, model: torch.nn.Module) -> powerSGD_hook.PowerSGDState | None:
        """What compresses the gradients of a model, without wrappers, and remembers what it cut off."""
        return None

    def buckets(self) -> dict[str, Any]:
        """How gradients are put together to travel."""
        return {}


class Alone(Parallel):
    """One process."""

    def __init__(self) -> None:
        super().__init__(DistributedType.NO)


class Copies(Parallel):
    """Each rank has the whole model; gradients are averaged in the backward (DDP).

    Args:
        kind: what to call it.
        options: of the wrapper.
    """

    def __init__(self, kind: DistributedType, options: DistributedDataParallelKwargs) -> None:
        super().__init__(kind)
        self._options = options
        self._compressing: weakref.WeakKeyDictionary[torch.nn.Module, powerSGD_hook.PowerSGDState] = (
            weakref.WeakKeyDictionary()
        )

    def wrap(self, model: torch.nn.Module, device: torch.device | None) -> torch.nn.Module:
        if isinstance(model, torch_parallel.DistributedDataParallel):
            return model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # nothing to average
        at = None if device is None or device.type == "cpu" else [device]
        wrapped = DistributedDataParallel(
            model, device_ids=at, output_device=at and at[0], **self._options.to_kwargs()
        )
        wrapped.settle()
        self._hook(wrapped)
        return wrapped

    def _hook(self, model: torch_parallel.DistributedDataParallel) -> None:
        options = self._options
        hooks: dict[str, Callable[..., Any]] = {
            "fp16": default_hooks.fp16_compress_hook,
            "bf16": default_hooks.bf16_compress_hook,
            "power_sgd": powerSGD_hook.powerSGD_hook,
            "batched_power_sgd": powerSGD_hook.batched_powerSGD_hook,
        }
        wrappers: dict[str, Callable[..., Any]] = {
            "fp16": default_hooks.fp16_compress_wrapper,
            "bf16": default_hooks.bf16_compress_wrapper,
        }
        if options.comm_hook == "no":
            return
        hook = hooks[options.comm_hook]
        if options.comm_wrapper != "no":
            hook = wrappers[options.comm_wrapper](hook)
        powered = "power_sgd" in options.comm_hook
        state = powerSGD_hook.PowerSGDState(None, **options.comm_state_option) if powered else None
        model.register_comm_hook(state, hook)
        if state is not None:
            self._compressing[without_wrappers(model)] = state

    def compression_of(self, model: torch.nn.Module) -> powerSGD_hook.PowerSGDState | None:
        return self._compressing.get(model)

    def buckets(self) -> dict[str, Any]:
        return {"bucket_cap_mb": self._options.bucket_cap_mb, "hook": str(self._options.comm_hook)}

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        wrapped = _ddp_of(model)
        return nullcontext() if wrapped is None else wrapped.no_sync()

    @contextmanager
    def sync_next_backward(self, model: torch.nn.Module) -> Iterator[None]:
        wrapped = _ddp_of(model)
        if wrapped is None:
            yield
            return
        before = (wrapped.require_backward_grad_sync, wrapped.require_forward_param_sync)
        wrapped.require_backward_grad_sync = wrapped.require_forward_param_sync = True
        wrapped.reducer.prepare_for_backward([])
        try:
            yield
        finally:
            wrapped.require_backward_grad_sync, wrapped.require_forward_param_sync = before

    def join(self, joinables: Sequence[Any]) -> AbstractContextManager[Any]:
        found = [_ddp_of(value) or value for value in joinables]
        return Join(found, enable=True, throw_on_early_termination=False)


def _ddp_of(model: Any) -> torch_parallel.DistributedDataParallel | None:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, torch_parallel.DistributedDataParallel) else None


def part_here(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it, if it isn't sharded."""
    to_local: Callable[[], torch.Tensor] | None = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if to_local is None else to_local()


def gradient_like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A gradient of a parameter, of what this rank holds of it."""
    whole: Any = parameter.detach()
    gradient = torch.empty_like(part_here(whole), dtype=part.dtype).copy_(part)
    if not hasattr(whole, "to_local"):
        return gradient
    sharded: torch.Tensor = type(whole).from_local(
        gradient,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return sharded


def without_wrappers(model: torch.nn.Module) -> torch.nn.Module:
    """The module that a script made: neither compiled nor wrapped."""
    inner: Any = model
    while True:
        inner = getattr(inner, "_orig_mod", inner)
        if not isinstance(inner, torch_parallel.DistributedDataParallel):
            break
        inner = inner.module
    return inner if isinstance(inner, torch.nn.Module) else model


def extract_model_from_parallel(
    model: torch.nn.Module,
    keep_fp32_wrapper: bool = True,
    keep_torch_compile: bool = True,
    recursive: bool = False,
) -> torch.nn.Module:
    """The module behind the wrappers of ranks.

    Args:
        model: prepared or not.
        keep_fp32_wrapper: False also undoes what mixed precision did to its forward.
        keep_torch_compile: return a compiled module that has no wrapper inside, if it was a compiled one.
        recursive: unwrap submodules too, in place.
    """
    inner = without_wrappers(model)
    if recursive:
        for parent in list(inner.modules()):
            for name, child in parent.named_children():
                setattr(parent, name, without_wrappers(child))
    if not keep_fp32_wrapper:
        FullPrecision().restore_model(inner)
    if keep_torch_compile and hasattr(model, "_orig_mod"):
        model._orig_mod = inner
        return model
    return inner


def is_compiled_module(module: Any) -> bool:
    """Whether it is what `torch.compile` makes of a module."""
    return isinstance(module, torch.nn.Module) and isinstance(
        getattr(module, "_orig_mod", None), torch.nn.Module
    )


def is_peft_model(model: torch.nn.Module) -> bool:
    """Whether it is a model of peft's, prepared or not. Whatever imports no peft has made none."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(without_wrappers(model), peft.PeftModel)
