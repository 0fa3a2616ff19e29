"""What a launch is told: by a configuration file, and by options that override it.

The file has the names of Hugging Face Accelerate's, so that its files are understood. What keepstep cannot
do is kept and named when something is launched, never passed over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, get_args

import yaml

from keepstep.errors import UsageError
from keepstep.launch.values import MixedPrecision, as_bool, as_gpu_ids, as_int, as_port, one_of

__all__ = ["Settings", "read_settings", "settings_of", "write_settings"]

_PRECISIONS: Final = get_args(MixedPrecision)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a script is started. Names are Accelerate's; None is "not said".

    Attributes:
        compute_environment: "LOCAL_MACHINE", the only one that keepstep launches in.
        distributed_type: "NO", "MULTI_CPU", "MULTI_GPU" or "FSDP".
        num_processes: ranks over all machines.
        num_machines: machines.
        machine_rank: this machine's number, from 0.
        main_process_ip: address of machine 0.
        main_process_port: port there; 0 for a free one.
        mixed_precision: as for `Accelerator`.
        use_cpu: train on the CPU even if there are GPUs.
        gpu_ids: GPUs of this machine that may be used, as "0,1"; "all" for all.
        main_training_function: of no effect but on TPUs.
        debug: say more about what goes wrong.
        rdzv_backend: how machines find each other, "static" or a backend of torchrun ("c10d", ...).
        same_network: of no effect: machines always meet at `main_process_ip`.
        gradient_accumulation_steps: as for `Accelerator`.
        dynamo_config: options of torch.compile, by names that begin with `dynamo_`.
        fsdp_config: options of FSDP2, by names that begin with `fsdp_`.
        unsupported: what the file asks for and keepstep has not, by name.
    """

    compute_environment: str = "LOCAL_MACHINE"
    distributed_type: str | None = None
    num_processes: int | None = None
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    mixed_precision: str | None = None
    use_cpu: bool = False
    gpu_ids: str | None = None
    main_training_function: str = "main"
    debug: bool = False
    rdzv_backend: str | None = None
    same_network: bool = True
    gradient_accumulation_steps: int | None = None
    dynamo_config: Mapping[str, str] = field(default_factory=dict)
    fsdp_config: Mapping[str, str] = field(default_factory=dict)
    unsupported: Mapping[str, Any] = field(default_factory=dict)


_ELSEWHERE: Final = frozenset(
    {
        *("deepspeed_config", "megatron_lm_config", "fp8_config", "parallelism_config", "mpirun_config"),
        *("downcast_bf16", "enable_cpu_affinity", "command_file", "commands"),
        *("tpu_name", "tpu_zone", "tpu_use_cluster", "tpu_use_sudo", "tpu_vm", "tpu_env"),
        *("ec2_instance_type", "iam_role_name", "image_uri", "profile", "region", "base_job_name"),
        *("pytorch_version", "transformers_version", "py_version", "additional_args"),
        *("sagemaker_inputs_file", "sagemaker_metrics_file"),
    }
)
"""Keys of Accelerate's files that ask for what keepstep has not, unless they are empty, false or "no"."""


def read_settings(path: Path) -> Settings:
    """Read a configuration file, YAML or (`*.json`) JSON, keepstep's or Accelerate's.

    Raises:
        UsageError: the file is not there, is no such file, or has keys or values that nobody knows.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UsageError(
            f"There is no configuration file {path}. Write one with `keepstep config --config_file {path}`, "
            "or leave out --config_file to use the default one, or none."
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"The configuration file {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"The configuration file {path} holds no names and values. See `keepstep config`.")
    return settings_of({str(name): value for name, value in found.items()}, f"The configuration file {path}")


def settings_of(found: Mapping[str, Any], source: str) -> Settings:
    """Make settings of names and values as they stand in a file.

    Args:
        found: names and values.
        source: where they come from, for messages.

    Raises:
        UsageError: a name that nobody knows, or a value that is not allowed; the message names it.
    """
    found = _in_todays_names(found)
    known = {entry.name for entry in fields(Settings)} - {"unsupported"}
    unknown = sorted(set(found) - known - _ELSEWHERE)
    if unknown:
        raise UsageError(
            f"{source} has keys that keepstep does not know: {', '.join(unknown)}. Allowed: "
            f"{', '.join(sorted(known))}. Correct or remove them."
        )
    given = {name: value for name, value in found.items() if value is not None and name in known}
    try:
        values: dict[str, Any] = {name: _READ[name](name, value) for name, value in given.items()}
        return Settings(
            **values,
            unsupported={name: found[name] for name in sorted(_ELSEWHERE & set(found)) if _asks(found[name])},
        )
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None


def write_settings(settings: Settings, path: Path) -> None:
    """Write a configuration file, YAML or (`*.json`) JSON; what is not said is left out."""
    values = {entry.name: getattr(settings, entry.name) for entry in fields(settings)}
    told: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    told |= told.pop("unsupported")
    for section in ("dynamo_config", "fsdp_config"):
        told[section] = {name: _plain(value) for name, value in told[section].items()}
        if not told[section]:
            del told[section]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        text = json.dumps(told, indent=2, sort_keys=True) + "\n"
    else:
        text = yaml.safe_dump(told, sort_keys=True)
    path.write_text(text, encoding="utf-8")


def _in_todays_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Old files said `fp16: true`, and `dynamo_backend` outside its section; -1 processes are none said."""
    now = dict(found)
    if now.pop("fp16", False):
        now.setdefault("mixed_precision", "fp16")
    backend = now.pop("dynamo_backend", None)
    if backend is not None:
        now.setdefault("dynamo_config", {"dynamo_backend": backend})
    if now.get("num_processes") == -1:
        del now["num_processes"]
    return now


def _asks(value: Any) -> bool:
    return bool(value) and str(value).lower() not in ("no", "false", "none")


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict | list):
        raise UsageError(f"{name} is {value!r}; expected a text.")
    return "NO" if value is False else str(value)  # YAML takes a bare NO for false


def _section(name: str, value: Any) -> dict[str, str]:
    """A section's options as texts, with the prefix that Accelerate's names have."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {value!r}; expected names and values.")
    prefix = name.removesuffix("config")
    strange = sorted(str(key) for key in value if not str(key).startswith(prefix))
    if strange:
        raise UsageError(f"{name} has keys that do not begin with {prefix}: {', '.join(strange)}.")
    return {str(key): _option(str(key), item) for key, item in value.items() if item is not None}


def _option(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if value is False and name == "dynamo_backend":
        return "no"  # which YAML takes for false
    return str(value).lower() if isinstance(value, bool) else str(value)


def _plain(value: str) -> Any:
    """An option's text as a file has it: numbers and truth values bare."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.isdecimal() else value


_READ: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "compute_environment": _text,
    "distributed_type": _text,
    "num_processes": lambda name, value: as_int(name, value, least=1),
    "num_machines": lambda name, value: as_int(name, value, least=1),
    "machine_rank": lambda name, value: as_int(name, value, least=0),
    "main_process_ip": _text,
    "main_process_port": as_port,
    "mixed_precision": lambda name, value: one_of(name, _text(name, value).lower(), _PRECISIONS),
    "use_cpu": as_bool,
    "gpu_ids": as_gpu_ids,
    "main_training_function": _text,
    "debug": as_bool,
    "rdzv_backend": _text,
    "same_network": as_bool,
    "gradient_accumulation_steps": lambda name, value: as_int(name, value, least=1),
    "dynamo_config": _section,
    "fsdp_config": _section,
}
