"""`keepstep launch`: start a training script, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from keepstep.errors import UsageError
from keepstep.launch.environment import default_config_file
from keepstep.launch.machine import ThisMachine
from keepstep.launch.plan import Manner, Script, override, plan_launch
from keepstep.launch.restarts import DEFAULT_LIMIT, Restarts
from keepstep.launch.runner import run_plan
from keepstep.launch.settings import Settings, read_settings
from keepstep.launch.values import as_gpu_ids

__all__ = ["command", "launch_options", "settings_for"]

F = TypeVar("F", bound=Callable[..., Any])

_HARDWARE = (
    click.option("--cpu", is_flag=True, help="Train on the CPU even if there are GPUs."),
    click.option("--multi_gpu", is_flag=True, help="Train on GPUs; fail if there are none."),
    click.option("--gpu_ids", metavar="IDS", help='GPUs of this machine that may be used, as "0,1"; "all".'),
    click.option("--num_processes", type=click.IntRange(1), help="Processes on all machines together."),
    click.option("--num_machines", type=click.IntRange(1), help="Machines; the same command runs on each."),
    click.option("--machine_rank", type=click.IntRange(0), help="The number of this machine, from 0."),
    click.option("--main_process_ip", metavar="ADDRESS", help="Address of machine 0."),
    click.option("--main_process_port", type=click.IntRange(0, 65535), help="Port there; 0 for a free one."),
    click.option("--same_network", is_flag=True, help="No effect: machines meet at --main_process_ip."),
    click.option("--num_cpu_threads_per_process", type=click.IntRange(1), help="Sets OMP_NUM_THREADS."),
)
_TRAINING = (
    click.option(
        "--mixed_precision", type=click.Choice(["no", "fp16", "bf16", "fp8"]), help="As for Accelerator."
    ),
    click.option("--gradient_accumulation_steps", type=click.IntRange(1), help="As for Accelerator."),
    click.option("--dynamo_backend", metavar="NAME", help='Of torch.compile, as "inductor"; "no".'),
    click.option("--dynamo_mode", metavar="NAME", help='As "default", "reduce-overhead", "max-autotune".'),
    click.option("--dynamo_use_fullgraph", is_flag=True, default=None, help="One graph, or an error."),
    click.option("--dynamo_use_dynamic", is_flag=True, default=None, help="Shapes may change."),
    click.option("--dynamo_use_regional_compilation", is_flag=True, default=None, help="Block by block."),
    click.option("--debug", is_flag=True, help="Say more about what goes wrong between ranks."),
)
_SHARDING = (
    click.option("--use_fsdp", is_flag=True, help="Shard parameters over the ranks (FSDP2)."),
    *(
        click.option(f"--fsdp_{name}", metavar=metavar, help=words)
        for name, metavar, words in (
            ("version", "2", "2, the only one."),
            ("reshard_after_forward", "BOOL", "Free the parameters of other ranks after the forward."),
            ("offload_params", "BOOL", "Keep parameters and gradients on the CPU."),
            ("auto_wrap_policy", "NAME", "TRANSFORMER_BASED_WRAP, SIZE_BASED_WRAP or NO_WRAP."),
            ("transformer_layer_cls_to_wrap", "NAMES", "Classes to shard each by itself, with commas."),
            ("min_num_params", "N", "For SIZE_BASED_WRAP."),
            ("state_dict_type", "NAME", "SHARDED_STATE_DICT or FULL_STATE_DICT."),
            ("cpu_ram_efficient_loading", "BOOL", "Only rank 0 reads pretrained weights."),
            ("sync_module_states", "BOOL", "For files of FSDP1."),
            ("activation_checkpointing", "BOOL", "Compute activations again in the backward."),
            ("sharding_strategy", "NAME", "For files of FSDP1: FULL_SHARD, SHARD_GRAD_OP ..."),
            ("backward_prefetch", "NAME", "For files of FSDP1."),
            ("forward_prefetch", "BOOL", "For files of FSDP1."),
            ("use_orig_params", "BOOL", "For files of FSDP1."),
        )
    ),
)
_WATCHING = (
    click.option(
        "--max_restarts",
        type=click.IntRange(0),
        help=f"Start failed ranks again at most so often, whatever failed. Default: {DEFAULT_LIMIT}, when "
        "ranks were killed or an error came later than the first minute.",
    ),
    click.option("--monitor_interval", type=float, default=0.1, help="Seconds between looks at the ranks."),
    click.option("--rdzv_backend", metavar="NAME", help='How machines meet: "static" or one of torchrun\'s.'),
    click.option("--rdzv_conf", metavar="K=V,...", default="", help="More for that backend."),
    click.option("--role", default="rank", help="Name of the ranks in front of their output with --tee."),
    click.option(
        "--tee", metavar="0-3", help="Output into files, too, with prefix: 1 stdout, 2 stderr, 3 both."
    ),
    click.option("--log_dir", metavar="DIR", help="Directory of those files; alone it means --tee 3."),
)
_ELSEWHERE = (
    click.option("--main_training_function", metavar="NAME", help="No effect but on TPUs."),
    click.option("--use_deepspeed", is_flag=True, help="Refused: use --use_fsdp."),
    click.option("--use_megatron_lm", is_flag=True, help="Refused."),
    click.option("--tpu", is_flag=True, help="Refused."),
)


def launch_options(function: F) -> F:
    """Every option that says how processes are started."""
    config = click.option(
        "--config_file",
        type=click.Path(path_type=Path),
        help="Settings that options override. Default: what `keepstep config` wrote, if it did.",
    )
    for option in reversed((config, *_HARDWARE, *_TRAINING, *_SHARDING, *_WATCHING, *_ELSEWHERE)):
        function = option(function)
    return function


def settings_for(config_file: Path | None, options: Mapping[str, Any]) -> tuple[Settings, Manner]:
    """What is told by the configuration file and, over it, by options.

    Raises:
        UsageError: a file or a value that is not allowed.
    """
    options = dict(options)
    default = default_config_file()
    path = config_file or (default if default.exists() else None)
    settings = Settings() if path is None else read_settings(path)
    if settings.fsdp_config and settings.distributed_type is None:
        options["use_fsdp"] = True
    given: dict[str, Any] = {
        "distributed_type": _kind(options),
        "use_cpu": options["cpu"] or None,
        "debug": options["debug"] or None,
        **{name: value for name, value in options.items() if name.startswith(("fsdp_", "dynamo_"))},
        **{
            name: options[name]
            for name in (
                *("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"),
                *("mixed_precision", "gradient_accumulation_steps", "gpu_ids", "rdzv_backend"),
                "main_training_function",
            )
        },
    }
    if given["gpu_ids"] is not None:
        given["gpu_ids"] = as_gpu_ids("--gpu_ids", given["gpu_ids"])
    told = override(settings, given)
    _check_sections(told, given)
    return told, _manner(options)


def _check_sections(settings: Settings, given: Mapping[str, Any]) -> None:
    """Options of what is off would have no effect."""
    off = {
        "fsdp_": ("--use_fsdp", settings.distributed_type != "FSDP"),
        "dynamo_": ("--dynamo_backend", settings.dynamo_config.get("dynamo_backend", "no").lower() == "no"),
    }
    for prefix, (switch, is_off) in off.items():
        names = [name for name, value in given.items() if name.startswith(prefix) and value is not None]
        idle = [f"--{name}" for name in names if f"--{name}" != switch]
        if is_off and idle:
            raise UsageError(f"{', '.join(idle)} has no effect without {switch}. Add that, or leave it out.")


def _kind(options: Mapping[str, Any]) -> str | None:
    kinds = {
        "tpu": "XLA",
        "use_deepspeed": "DEEPSPEED",
        "use_megatron_lm": "MEGATRON_LM",
        "use_fsdp": "FSDP",
        "multi_gpu": "MULTI_GPU",
    }
    return next((kind for name, kind in kinds.items() if options[name]), None)


def _manner(options: Mapping[str, Any]) -> Manner:
    limit = options["max_restarts"]
    if options["tee"] not in (None, "0", "1", "2", "3") and ":" not in options["tee"]:
        raise UsageError(f"--tee is {options['tee']!r}; expected 0 to 3, or ranks as 0:3,1:1.")
    if options["monitor_interval"] <= 0:
        raise UsageError(
            f"--monitor_interval is {options['monitor_interval']}; expected seconds, more than 0."
        )
    return Manner(
        cpu_threads=options["num_cpu_threads_per_process"],
        restarts=Restarts() if limit is None else Restarts(limit=limit, after_any_failure=True),
        monitor_interval_s=options["monitor_interval"],
        rdzv_conf=_pairs(options["rdzv_conf"]),
        role=options["role"],
        tee="3" if options["tee"] is None and options["log_dir"] is not None else options["tee"],
        log_dir=options["log_dir"],
        wants_gpus=options["multi_gpu"],
    )


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if any(not (name and sign) for name, sign, _ in pairs):
        raise UsageError(
            f"--rdzv_conf is {text!r}; expected names and values, as join_timeout=60,timeout=900."
        )
    return {name.strip(): value.strip() for name, _, value in pairs}


@click.command(
    name="launch",
    short_help="Start a training script, on one process or many.",
    context_settings={
        "allow_interspersed_args": False,
        "token_normalize_func": lambda name: name.replace("-", "_"),
    },
    epilog="\b\nExit codes:\n"
    "  0  the script ended well on every rank\n"
    "  2  wrong usage; nothing was started (or the script's own)\n"
    "  N  the script's; 128 and the number of the signal that killed it",
)
@launch_options
@click.option("-m", "--module", is_flag=True, help="SCRIPT is the name of a module, as for `python -m`.")
@click.option("--no_python", is_flag=True, help="SCRIPT is a program, run as it is.")
@click.option("-q", "--quiet", is_flag=True, help="Say only what fails.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    script: str,
    arguments: Sequence[str],
    config_file: Path | None,
    module: bool,
    no_python: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Start a training script, on one process or many.

    Options come before SCRIPT; all that follows it is the script's own. What is not said is read from the
    configuration file, and without one the script runs on every GPU of this machine, else on one CPU process.
    Ranks that are killed are started again, and a script that calls Accelerator.resume() goes on by itself.
    """
    if module and no_python:
        raise UsageError("--module and --no_python were both given. Leave one out.")
    kind = "module" if module else "program" if no_python else "file"
    if kind == "file" and not Path(script).exists():
        raise UsageError(
            f"There is no script {script}. Options of keepstep launch come before it, its own after it."
        )
    settings, manner = settings_for(config_file, options)
    plan = plan_launch(settings, Script(target=script, arguments=arguments, kind=kind), manner, ThisMachine())
    click.get_current_context().exit(run_plan(plan, quiet=quiet))
