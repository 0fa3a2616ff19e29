"""How the ranks share one model: not at all, by equal copies (DDP), or by shards (FSDP2).

`Alone` is the whole of the seam with nothing to do in it; the other two replace what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from keepstep.errors import UsageError
from keepstep.train.precision import FullPrecision
from keepstep.train.ranks.process import DistributedType
from keepstep.train.settings.plugins import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin

__all__ = [
    "Alone",
    "Copies",
    "Parallel",
    "Shards",
    "extract_model_from_parallel",
    "gradient_like",
    "part_here",
    "without_wrappers",
]


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

    def wrap(self, model: torch.nn.Module, device: torch.device | None) -> torch.nn.Module:
        if isinstance(model, DistributedDataParallel):
            return model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # nothing to average
        at = None if device is None or device.type == "cpu" else [device]
        wrapped = DistributedDataParallel(
            model, device_ids=at, output_device=at and at[0], **self._options.to_kwargs()
        )
        self._hook(wrapped)
        return wrapped

    def _hook(self, model: DistributedDataParallel) -> None:
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


class Shards(Parallel):
    """Each rank holds a part of every parameter, its gradient and its optimizer state (FSDP2).

    Args:
        plugin: which modules are units, and more.
        autocast_dtype: what to compute in, of the run's mixed precision; None for the parameters' own.
    """

    def __init__(self, plugin: FullyShardedDataParallelPlugin, autocast_dtype: torch.dtype | None) -> None:
        super().__init__(DistributedType.FSDP)
        self._plugin = plugin
        self._dtype = autocast_dtype
        self._replaced: dict[int, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}

    def wrap(self, model: torch.nn.Module, device: torch.device | None) -> torch.nn.Module:
        if isinstance(model, FSDPModule):
            return model
        plugin = self._plugin
        for value in [*model.parameters(), *model.buffers()]:
            dist.broadcast(value.detach(), 0)  # each rank cuts its part out of its own copy
        units = plugin.units(model)
        if plugin.activation_checkpointing:
            chosen = {id(unit) for unit in units}
            apply_activation_checkpointing(
                model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: id(module) in chosen
            )
        before = dict(model.named_parameters(remove_duplicate=False))
        ignored = {p for module in plugin.ignored_modules or () for p in module.parameters()}
        options: dict[str, Any] = {
            "reshard_after_forward": plugin.reshard_after_forward,
            "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(param_dtype=self._dtype),
            "offload_policy": CPUOffloadPolicy() if plugin.cpu_offload else OffloadPolicy(),
            "ignored_params": ignored or None,
        }
        for unit in units:
            fully_shard(unit, **options)
        fully_shard(model, **options)
        after = dict(model.named_parameters(remove_duplicate=False))
        # The old ones are kept: an id is theirs only while they live.
        self._replaced.update((id(old), (old, after[name])) for name, old in before.items())
        return model

    def adopt(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["params"] = [self._replaced.get(id(p), (p, p))[1] for p in group["params"]]
        for old in [p for p in optimizer.state if id(p) in self._replaced]:
            optimizer.state[self._replaced[id(old)][1]] = optimizer.state.pop(old)
        self.place_state(optimizer)

    @contextmanager
    def no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        inner = without_wrappers(model)
        if not isinstance(inner, FSDPModule):
            yield
            return
        inner.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            inner.set_requires_gradient_sync(True)

    def clip_norm(self, parameters: Sequence[torch.Tensor], most: float, kind: float) -> torch.Tensor:
        norm = super().clip_norm(parameters, most, kind)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def join(self, joinables: Sequence[Any]) -> AbstractContextManager[Any]:
        raise UsageError(
            "join_uneven_inputs works with whole copies of a model (DDP). With sharded parameters every rank "
            "takes part in every forward; let even_batches fill the last batch."
        )

    def place_state(self, optimizer: Optimizer) -> None:
        for parameter, state in optimizer.state.items():
            if not isinstance(parameter, DTensor):
                continue
            for name, value in state.items():
                is_whole = isinstance(value, torch.Tensor) and not isinstance(value, DTensor)
                if is_whole and value.shape == parameter.shape:
                    state[name] = distribute_tensor(
                        value.to(parameter.device),
                        parameter.device_mesh,
                        parameter.placements,
                        src_data_rank=None,
                    )

    def check_capturable(self, models: Sequence[torch.nn.Module], inside_window: bool) -> None:
        if inside_window and any(isinstance(model, FSDPModule) for model in models):
            raise UsageError(
                "A checkpoint was asked for inside an accumulation window. Sharded models keep unfinished "
                "gradients where they can't be saved. Save where accelerator.sync_gradients is True, after "
                "the optimizer's step."
            )


def _ddp_of(model: Any) -> DistributedDataParallel | None:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, DistributedDataParallel) else None


def part_here(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: all of it, if it isn't sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A gradient of a parameter, of what this rank holds of it."""
    here = part_here(parameter.detach())
    gradient = torch.empty_like(here, dtype=part.dtype).copy_(part)
    if not isinstance(parameter, DTensor):
        return gradient
    return DTensor.from_local(
        gradient,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def without_wrappers(model: torch.nn.Module) -> torch.nn.Module:
    """The module that a script made: neither compiled nor wrapped."""
    inner: Any = model
    while True:
        inner = getattr(inner, "_orig_mod", inner)
        if not isinstance(inner, DistributedDataParallel):
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
