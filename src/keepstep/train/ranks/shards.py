"""Ranks that share one model by shards (FSDP2). Apart, as what it needs takes a second to import."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from keepstep.errors import UsageError
from keepstep.train.ranks.parallel import Parallel, without_wrappers
from keepstep.train.ranks.process import DistributedType
from keepstep.train.settings.plugins import FullyShardedDataParallelPlugin

__all__ = ["Shards"]


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
