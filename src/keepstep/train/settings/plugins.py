"""Options of the libraries below: how torch wraps, compiles, shards and profiles."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch

from keepstep.errors import UsageError
from keepstep.train.settings.kwargs import KwargsHandler

__all__ = [
    "AutocastKwargs",
    "DDPCommunicationHookType",
    "DistributedDataParallelKwargs",
    "DynamoBackend",
    "FullyShardedDataParallelPlugin",
    "InitProcessGroupKwargs",
    "PrecisionType",
    "ProfileKwargs",
    "RNGType",
    "TorchDynamoPlugin",
]


@dataclass(kw_only=True)
class AutocastKwargs(KwargsHandler):
    """How `torch.autocast` is entered.

    Args:
        enabled: False computes in the precision of the parameters.
        cache_enabled: keep casted weights until the context ends; None for torch's default.
    """

    enabled: bool = True
    cache_enabled: bool | None = None


class DDPCommunicationHookType(enum.StrEnum):
    """How gradients travel between ranks; see torch's DDP communication hooks."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"
    POWER_SGD = "power_sgd"
    BATCHED_POWER_SGD = "batched_power_sgd"


@dataclass(kw_only=True)
class DistributedDataParallelKwargs(KwargsHandler):
    """How a model is wrapped in `torch.nn.parallel.DistributedDataParallel`; see there.

    Args:
        dim: as there.
        broadcast_buffers: send rank 0's buffers to all before each forward.
        bucket_cap_mb: size of the buckets that gradients travel in, MiB.
        find_unused_parameters: look for parameters without gradients at each backward.
        check_reduction: as there.
        gradient_as_bucket_view: let gradients live in the buckets.
        static_graph: the graph never changes.
        comm_hook: how gradients travel.
        comm_wrapper: "fp16" or "bf16" around `comm_hook`.
        comm_state_option: options of PowerSGD.
    """

    dim: int = 0
    broadcast_buffers: bool = True
    bucket_cap_mb: int = 25
    find_unused_parameters: bool = False
    check_reduction: bool = False
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    comm_hook: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_wrapper: DDPCommunicationHookType | str = DDPCommunicationHookType.NO
    comm_state_option: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("comm_hook", "comm_wrapper"):
            value = getattr(self, name)
            allowed = [kind.value for kind in DDPCommunicationHookType]
            if value not in (allowed if name == "comm_hook" else allowed[:3]):
                raise UsageError(
                    f"DistributedDataParallelKwargs({name}={value!r}): {name} must be one of "
                    f"{', '.join(allowed if name == 'comm_hook' else allowed[:3])}."
                )

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments of DistributedDataParallel."""
        names = (
            "dim",
            "bucket_cap_mb",
            "find_unused_parameters",
            "check_reduction",
            "gradient_as_bucket_view",
            "static_graph",
        )
        options = {name: getattr(self, name) for name in names}
        return {**options, "forward_sync_buffers": self.broadcast_buffers}


@dataclass(kw_only=True)
class InitProcessGroupKwargs(KwargsHandler):
    """How the ranks meet.

    Args:
        backend: of torch.distributed; None for gloo on CPUs, and NCCL beside it on GPUs.
        init_method: None, or "env://": launchers tell by the environment.
        timeout: how long ranks wait for each other; None for ten minutes.
    """

    backend: str | None = None
    init_method: str | None = None
    timeout: timedelta | None = None

    def __post_init__(self) -> None:
        if self.init_method not in (None, "env://"):
            raise UsageError(
                f"InitProcessGroupKwargs(init_method={self.init_method!r}): ranks meet where the launcher's "
                "environment says. Leave it out, or call torch.distributed.init_process_group yourself "
                "before the Accelerator is made."
            )


_ACTIVITIES = {
    "cpu": torch.profiler.ProfilerActivity.CPU,
    "cuda": torch.profiler.ProfilerActivity.CUDA,
    "xpu": torch.profiler.ProfilerActivity.XPU,
}


@dataclass(kw_only=True)
class ProfileKwargs(KwargsHandler):
    """How `torch.profiler.profile` is made; see there.

    Args:
        activities: of "cpu", "cuda" and "xpu"; None for what there is.
        schedule_option: arguments of `torch.profiler.schedule`.
        on_trace_ready: called when a trace is ready.
        record_shapes: keep the shapes of inputs.
        profile_memory: follow allocations.
        with_stack: keep source lines.
        with_flops: estimate operations.
        with_modules: keep the names of modules.
        output_trace_dir: where each rank writes `profile_RANK.json` for chrome://tracing; None for nowhere.
    """

    activities: list[str] | None = None
    schedule_option: dict[str, int] | None = None
    on_trace_ready: Callable[..., Any] | None = None
    record_shapes: bool = False
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False
    with_modules: bool = False
    output_trace_dir: str | None = None

    def __post_init__(self) -> None:
        for name in self.activities or []:
            if name not in _ACTIVITIES:
                raise UsageError(
                    f"ProfileKwargs(activities={self.activities!r}): {name!r} is not one of "
                    f"{', '.join(_ACTIVITIES)}."
                )

    def build(self) -> torch.profiler.profile:
        """A profiler with these options."""
        chosen = None if self.activities is None else [_ACTIVITIES[name] for name in self.activities]
        options = self.schedule_option
        return torch.profiler.profile(
            activities=chosen,
            schedule=None if options is None else torch.profiler.schedule(**options),
            on_trace_ready=self.on_trace_ready,
            record_shapes=self.record_shapes,
            profile_memory=self.profile_memory,
            with_stack=self.with_stack,
            with_flops=self.with_flops,
            with_modules=self.with_modules,
        )


class PrecisionType(enum.StrEnum):
    """Values of `mixed_precision`."""

    NO = "no"
    FP8 = "fp8"
    FP16 = "fp16"
    BF16 = "bf16"


class RNGType(enum.StrEnum):
    """Kinds of random generators."""

    TORCH = "torch"
    CUDA = "cuda"
    XPU = "xpu"
    GENERATOR = "generator"


class DynamoBackend(enum.StrEnum):
    """Backends of `torch.compile`; any other that torch knows may be given by its name."""

    NO = "no"
    EAGER = "eager"
    AOT_EAGER = "aot_eager"
    INDUCTOR = "inductor"
    CUDAGRAPHS = "cudagraphs"


@dataclass(kw_only=True)
class TorchDynamoPlugin:
    """How models are compiled; see `torch.compile`.

    Args:
        backend: "no" (don't compile), "inductor" or another that torch lists; case doesn't matter.
        mode: "default", "reduce-overhead" or "max-autotune".
        fullgraph: refuse to break a model into several graphs.
        dynamic: trace with dynamic shapes; None lets torch decide.
        options: for the backend.
        disable: compile nothing.
        use_regional_compilation: compile repeated blocks one by one, which starts sooner.
    """

    backend: str = "no"
    mode: str | None = None
    fullgraph: bool = False
    dynamic: bool | None = None
    options: dict[str, Any] | None = None
    disable: bool = False
    use_regional_compilation: bool = False

    def __post_init__(self) -> None:
        self.backend = str(self.backend).lower()
        known = ["no", "eager", "aot_eager", *torch.compiler.list_backends()]
        if self.backend not in known:
            raise UsageError(
                f"TorchDynamoPlugin(backend={self.backend!r}): torch has no such backend here; it has "
                f"{', '.join(dict.fromkeys(known))}."
            )

    def to_kwargs(self) -> dict[str, Any]:
        """The arguments of `torch.compile`."""
        mode = None if self.options is not None else self.mode
        return {
            "backend": self.backend,
            "mode": mode,
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
            "options": self.options,
            "disable": self.disable,
        }


@dataclass(kw_only=True)
class FullyShardedDataParallelPlugin:
    """How parameters, gradients and optimizer states are sharded over the ranks (FSDP2, `fully_shard`).

    Args:
        fsdp_version: 2.
        reshard_after_forward: free whole parameters after the forward; the backward gathers them again.
        mixed_precision_policy: torch's `MixedPrecisionPolicy`; None follows `mixed_precision`.
        auto_wrap_policy: which submodules are units of their own: "transformer_based_wrap" (those whose class
            is in `transformer_cls_names_to_wrap`), "size_based_wrap" (those with at least `min_num_params`),
            "no_wrap" (the model is one unit), or a function that says so of a module. None: by class if names
            are given, by size if a number is given, else "no_wrap".
        transformer_cls_names_to_wrap: names of classes, also as one text with commas; None asks the model's
            `_no_split_modules`, which models of transformers have.
        min_num_params: parameters in a unit, at least.
        cpu_offload: keep shards in host memory.
        ignored_modules: left whole, on every rank.
        activation_checkpointing: compute activations of the units again in the backward.
        state_dict_type: accepted for other scripts; checkpoints are always sharded, and whole for who reads.

    Raises:
        UsageError: a value is impossible.
    """

    fsdp_version: int = 2
    reshard_after_forward: bool = True
    mixed_precision_policy: Any = None
    auto_wrap_policy: (
        Literal["transformer_based_wrap", "size_based_wrap", "no_wrap"]
        | Callable[[torch.nn.Module], bool]
        | None
    ) = None
    transformer_cls_names_to_wrap: list[str] | str | None = None
    min_num_params: int | None = None
    cpu_offload: bool = False
    ignored_modules: Iterable[torch.nn.Module] | None = None
    activation_checkpointing: bool = False
    state_dict_type: str | None = None

    def __post_init__(self) -> None:
        if self.fsdp_version != 2:
            raise UsageError(
                f"FullyShardedDataParallelPlugin(fsdp_version={self.fsdp_version!r}): keepstep shards with "
                "FSDP2 (torch's fully_shard). Leave it out, or give 2."
            )
        if isinstance(self.transformer_cls_names_to_wrap, str):
            self.transformer_cls_names_to_wrap = [
                name.strip() for name in self.transformer_cls_names_to_wrap.split(",") if name.strip()
            ]
        if self.auto_wrap_policy is None:
            if self.transformer_cls_names_to_wrap is not None:
                self.auto_wrap_policy = "transformer_based_wrap"
            else:
                self.auto_wrap_policy = "no_wrap" if self.min_num_params is None else "size_based_wrap"
        known = ("transformer_based_wrap", "size_based_wrap", "no_wrap")
        if isinstance(self.auto_wrap_policy, str):
            name = self.auto_wrap_policy.lower()
            if name not in known:
                raise UsageError(
                    f"FullyShardedDataParallelPlugin(auto_wrap_policy={self.auto_wrap_policy!r}): it must be "
                    f"one of {', '.join(known)}, or a function of a module."
                )
            self.auto_wrap_policy = name  # type: ignore[assignment]
        if self.auto_wrap_policy == "size_based_wrap" and not self.min_num_params:
            raise UsageError(
                "FullyShardedDataParallelPlugin(auto_wrap_policy='size_based_wrap') needs min_num_params."
            )

    def units(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The submodules that are units of their own, inner ones first; not the model itself.

        Raises:
            UsageError: no class is known to wrap, or the model has none of those named.
        """
        is_unit = self._is_unit(model)
        found = [
            module for module in reversed(list(model.modules())) if module is not model and is_unit(module)
        ]
        if self.auto_wrap_policy == "transformer_based_wrap" and not found:
            raise UsageError(
                f"transformer_cls_names_to_wrap is {self._class_names(model)!r}, but {type(model).__name__} "
                "has no submodule of such a class."
            )
        return found

    def _class_names(self, model: torch.nn.Module) -> list[str]:
        names = self.transformer_cls_names_to_wrap or getattr(model, "_no_split_modules", None)
        if not names:
            raise UsageError(
                "auto_wrap_policy='transformer_based_wrap' needs transformer_cls_names_to_wrap, the names of "
                f"the classes to wrap: {type(model).__name__} names none itself (_no_split_modules)."
            )
        return list(names)

    def _is_unit(self, model: torch.nn.Module) -> Callable[[torch.nn.Module], bool]:
        policy = self.auto_wrap_policy
        if callable(policy):
            return policy
        if policy == "transformer_based_wrap":
            names = set(self._class_names(model))
            return lambda module: type(module).__name__ in names
        if policy == "size_based_wrap":
            least = self.min_num_params or 0
            return lambda module: sum(p.numel() for p in module.parameters(recurse=False)) >= least
        return lambda _: False
