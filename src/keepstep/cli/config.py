"""`keepstep config`: questions whose answers `keepstep launch` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from keepstep.errors import UsageError
from keepstep.launch.basic import basic_settings
from keepstep.launch.environment import default_config_file
from keepstep.launch.settings import Settings, read_settings, settings_of, write_settings

__all__ = ["command"]

_EXIT_CODES: Final = "\b\nExit codes:\n  0  done\n  2  wrong usage, or not readable"
_BACKENDS: Final = ("eager", "aot_eager", "inductor", "cudagraphs")

_file = click.option(
    "--config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file, YAML or (*.json) JSON. Default: default_config.yaml in $KEEPSTEP_HOME, else in "
    "$XDG_CACHE_HOME/keepstep, else in ~/.cache/keepstep.",
)


@click.group(
    name="config",
    short_help="Answer questions once; `keepstep launch` reads the answers.",
    invoke_without_command=True,
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    epilog=_EXIT_CODES,
)
@_file
@click.pass_context
def command(ctx: click.Context, config_file: Path | None) -> None:
    """Answer questions once; `keepstep launch` reads the answers.

    Without a command it asks and writes the file. What is asked has its default in brackets.
    """
    ctx.obj = config_file
    if ctx.invoked_subcommand is None:
        _write(_ask(), config_file)


@command.command(name="default", short_help="Write the file for this machine.", epilog=_EXIT_CODES)
@_file
@click.option("--mixed_precision", type=click.Choice(["no", "fp16", "bf16"]), default="no")
@click.pass_obj
def default(outer: Path | None, config_file: Path | None, mixed_precision: str) -> None:
    """Write the file for this machine without asking: every GPU, else the CPU.

    A file that is there already is left as it is.
    """
    path = config_file or outer or default_config_file()
    if path.exists():
        raise UsageError(
            f"There is a configuration at {path} already, and it stays as it is. Delete it first, or rewrite "
            "it with the names of today by `keepstep config update`."
        )
    _write(basic_settings(mixed_precision), path)


@command.command(name="update", short_help="Rewrite a file with the names of today.", epilog=_EXIT_CODES)
@_file
@click.pass_obj
def update(outer: Path | None, config_file: Path | None) -> None:
    """Rewrite a file, keepstep's or Accelerate's, with the names of today and every default spelled out."""
    path = config_file or outer or default_config_file()
    _write(read_settings(path), path)


def _write(settings: Settings, config_file: Path | None) -> None:
    path = config_file or default_config_file()
    write_settings(settings, path)
    click.echo(f"The configuration is in {path}")


# ------------------------------------------------------------------------------------- questions


def _ask() -> Settings:
    found: dict[str, Any] = _ask_machines()
    found |= _ask_devices(found["num_machines"])
    backend = _choose("Compile models with torch.compile? Its backend", ("no", *_BACKENDS), "no")
    if backend != "no":
        found["dynamo_config"] = {
            "dynamo_backend": backend.upper(),
            "dynamo_mode": _choose("Its mode", ("default", "reduce-overhead", "max-autotune"), "default"),
            "dynamo_use_dynamic": _yes("May shapes change from batch to batch?", False),
            "dynamo_use_fullgraph": _yes("Fail if a model is more than one graph?", False),
        }
    found["mixed_precision"] = _choose("Mixed precision", ("no", "fp16", "bf16"), "no")
    found["debug"] = _yes("Say more about what goes wrong between ranks (slower)?", False)
    return settings_of(found, "The answers")


def _ask_machines() -> dict[str, Any]:
    where = _choose("Where does training run", ("this machine", "several machines"), "this machine")
    if where == "this machine":
        return {"num_machines": 1}
    machines = _number("How many machines", 2, least=2)
    return {
        "num_machines": machines,
        "machine_rank": click.prompt("The number of this machine", 0, type=click.IntRange(0, machines - 1)),
        "main_process_ip": click.prompt("The address of machine 0"),
        "main_process_port": click.prompt("The port there", 29500, type=click.IntRange(1, 65535)),
        "rdzv_backend": _choose("How machines find each other", ("static", "c10d"), "static"),
    }


def _ask_devices(machines: int) -> dict[str, Any]:
    on_cpu = _yes("On the CPU only?", False)
    total = _number("How many processes, on all machines together", machines, least=1)
    found: dict[str, Any] = {"use_cpu": on_cpu, "num_processes": total}
    if not on_cpu:
        found["gpu_ids"] = click.prompt('GPUs of this machine to use, as "0,1"', "all")
    found["distributed_type"] = "NO" if total == 1 else "MULTI_CPU" if on_cpu else "MULTI_GPU"
    if total > 1 and _yes("Shard parameters over the ranks (FSDP2)?", False):
        found["distributed_type"] = "FSDP"
        found["fsdp_config"] = _ask_sharding()
    return found


def _ask_sharding() -> dict[str, Any]:
    options: dict[str, Any] = {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": _yes("Free the other ranks' parameters after the forward?", True),
        "fsdp_offload_params": _yes("Keep parameters on the CPU?", False),
        "fsdp_activation_checkpointing": _yes("Compute activations again in the backward?", False),
    }
    policies = ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP")
    policy = _choose("What is sharded by itself", policies, policies[0])
    options["fsdp_auto_wrap_policy"] = policy
    if policy == "TRANSFORMER_BASED_WRAP":
        names = click.prompt("Classes of its layers, with commas", "", show_default=False)
        options["fsdp_transformer_layer_cls_to_wrap"] = names or None
    elif policy == "SIZE_BASED_WRAP":
        options["fsdp_min_num_params"] = _number("From how many parameters on", 100_000_000, least=1)
    kinds = ("SHARDED_STATE_DICT", "FULL_STATE_DICT")
    options["fsdp_state_dict_type"] = _choose("How states are saved", kinds, kinds[0])
    return options


def _choose(question: str, allowed: tuple[str, ...], default: str) -> str:
    answer: str = click.prompt(question, default, type=click.Choice(allowed, case_sensitive=False))
    return answer


def _number(question: str, default: int, *, least: int) -> int:
    answer: int = click.prompt(question, default, type=click.IntRange(least))
    return answer


def _yes(question: str, default: bool) -> bool:
    return click.confirm(question, default=default)
