"""What the environment says about a run. No other part of training reads it.

Launchers tell each process its place (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, as torchrun
does) and, in variables that begin with `KEEPSTEP_`, what the script itself leaves open.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from keepstep.errors import UsageError

__all__ = ["Environment", "Launched", "read_environment"]

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


@dataclass(frozen=True, kw_only=True)
class Launched:
    """This process's place among those that a launcher started together."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What was read.

    Attributes:
        launched: None for a process that was started by itself.
        use_cpu: train on the CPU even if there is an accelerator.
        mixed_precision: as for `Accelerator`; None if not said.
        gradient_accumulation_steps: as for `Accelerator`; None if not said.
        use_fsdp: shard parameters over the ranks.
        fsdp: options of the sharding, by their names in lower case.
        dynamo: options of `torch.compile`, by their names in lower case (`backend`, `mode` ...).
        debug: say more about what goes wrong.
    """

    launched: Launched | None = None
    use_cpu: bool = False
    mixed_precision: str | None = None
    gradient_accumulation_steps: int | None = None
    use_fsdp: bool = False
    fsdp: Mapping[str, str] = field(default_factory=dict)
    dynamo: Mapping[str, str] = field(default_factory=dict)
    debug: bool = False


def read_environment(environment: Mapping[str, str] | None = None) -> Environment:
    """Read the environment.

    Args:
        environment: names and values; None for this process's own.

    Raises:
        UsageError: a value is not allowed; the message names the variable.
    """
    variables = os.environ if environment is None else environment
    return Environment(
        launched=_launched(variables),
        use_cpu=_flag(variables, "KEEPSTEP_USE_CPU"),
        mixed_precision=variables.get("KEEPSTEP_MIXED_PRECISION") or None,
        gradient_accumulation_steps=_number(variables, "KEEPSTEP_GRADIENT_ACCUMULATION_STEPS", least=1),
        use_fsdp=_flag(variables, "KEEPSTEP_USE_FSDP"),
        fsdp=_options(variables, "KEEPSTEP_FSDP_"),
        dynamo=_options(variables, "KEEPSTEP_DYNAMO_"),
        debug=_flag(variables, "KEEPSTEP_DEBUG_MODE") or _flag(variables, "ACCELERATE_DEBUG_MODE"),
    )


def _launched(variables: Mapping[str, str]) -> Launched | None:
    size = _number(variables, "WORLD_SIZE", least=1)
    if size is None or size == 1:
        return None
    rank = _number(variables, "RANK", least=0)
    if rank is None or rank >= size:
        raise UsageError(
            f"WORLD_SIZE={size} and RANK={variables.get('RANK')!r} in the environment; each of several "
            f"processes needs a RANK of 0 to {size - 1}. Start the script with `keepstep launch` or "
            "torchrun, or unset WORLD_SIZE to train with one process."
        )
    return Launched(
        rank=rank,
        size=size,
        local_rank=rank if (local := _number(variables, "LOCAL_RANK", least=0)) is None else local,
        local_size=_number(variables, "LOCAL_WORLD_SIZE", least=1) or size,
    )


def _flag(variables: Mapping[str, str], name: str) -> bool:
    value = variables.get(name, "").lower()
    if value not in _TRUE + _FALSE:
        raise UsageError(
            f"{name}={value!r} in the environment; it must be one of {', '.join(_TRUE + _FALSE[1:])}."
        )
    return value in _TRUE


def _number(variables: Mapping[str, str], name: str, *, least: int) -> int | None:
    text = variables.get(name, "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name}={text!r} in the environment; it must be an integer of at least {least}.")
    return int(text)


def _options(variables: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in variables.items()
        if name.startswith(prefix) and value
    }
