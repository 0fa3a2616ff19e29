"""Options of the libraries below, from what a script hands over and from the environment's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepstep.errors import UsageError
from keepstep.train.settings.config import GradScalerKwargs
from keepstep.train.settings.plugins import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ProfileKwargs,
    TorchDynamoPlugin,
)

__all__ = ["Handlers", "compiling_of", "sharding_of"]

_FIELD_OF = {
    AutocastKwargs: "autocasting",
    DistributedDataParallelKwargs: "copies",
    GradScalerKwargs: "scaling",
    InitProcessGroupKwargs: "process_group",
    ProfileKwargs: "profiling",
}


@dataclass(frozen=True, kw_only=True)
class Handlers:
    """One of each kind of `kwargs_handlers`: what was given, or defaults."""

    autocasting: AutocastKwargs = field(default_factory=AutocastKwargs)
    copies: DistributedDataParallelKwargs = field(default_factory=DistributedDataParallelKwargs)
    scaling: GradScalerKwargs = field(default_factory=GradScalerKwargs)
    process_group: InitProcessGroupKwargs = field(default_factory=InitProcessGroupKwargs)
    profiling: ProfileKwargs = field(default_factory=ProfileKwargs)

    @classmethod
    def of(cls, given: Sequence[Any]) -> Handlers:
        """Sort them by kind.

        Raises:
            UsageError: one is of an unknown kind, or two are of the same.
        """
        found: dict[str, Any] = {}
        for handler in given:
            name = _FIELD_OF.get(type(handler))
            allowed = ", ".join(kind.__name__ for kind in _FIELD_OF)
            if name is None:
                raise UsageError(
                    f"kwargs_handlers holds a {type(handler).__name__}; allowed are {allowed}. Leave it out."
                )
            if name in found:
                raise UsageError(
                    f"kwargs_handlers holds two {type(handler).__name__}. Give one of each kind."
                )
            found[name] = handler
        return cls(**found)


_SHARDING_NAMES = {
    "auto_wrap_policy": "auto_wrap_policy",
    "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap",
    "min_num_params": "min_num_params",
    "offload_params": "cpu_offload",
    "reshard_after_forward": "reshard_after_forward",
    "activation_checkpointing": "activation_checkpointing",
    "state_dict_type": "state_dict_type",
    "version": "fsdp_version",
}
_WITHOUT_MEANING = {
    "backward_prefetch",
    "cpu_ram_efficient_loading",
    "forward_prefetch",
    "sharding_strategy",
    "sync_module_states",
    "use_orig_params",
}
"""Of FSDP1: FSDP2 always does, or never needs, what they ask for."""


def sharding_of(options: Mapping[str, str]) -> FullyShardedDataParallelPlugin:
    """Options of `fully_shard` from the words of the environment (KEEPSTEP_FSDP_...).

    Raises:
        UsageError: an option is unknown.
    """
    unknown = sorted(set(options) - set(_SHARDING_NAMES) - _WITHOUT_MEANING)
    if unknown:
        allowed = ", ".join(f"KEEPSTEP_FSDP_{name.upper()}" for name in _SHARDING_NAMES)
        raise UsageError(
            f"KEEPSTEP_FSDP_{unknown[0].upper()} in the environment is no option of sharding; allowed are "
            f"{allowed}."
        )
    values: dict[str, Any] = {
        _SHARDING_NAMES[name]: _value(text) for name, text in options.items() if name in _SHARDING_NAMES
    }
    return FullyShardedDataParallelPlugin(**values)


def compiling_of(options: Mapping[str, str]) -> TorchDynamoPlugin:
    """Options of `torch.compile` from the words of the environment (KEEPSTEP_DYNAMO_...)."""
    return TorchDynamoPlugin(
        backend=options.get("backend", "no"),
        mode=options.get("mode"),
        fullgraph=bool(_value(options.get("use_fullgraph", "false"))),
        dynamic=None if "use_dynamic" not in options else bool(_value(options["use_dynamic"])),
        use_regional_compilation=bool(_value(options.get("use_regional_compilation", "false"))),
    )


def _value(text: str) -> bool | int | str:
    lowered = text.lower()
    if lowered in ("true", "yes", "on"):
        return True
    if lowered in ("false", "no", "off"):
        return False
    return int(text) if text.isdecimal() else text
