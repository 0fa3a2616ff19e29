"""The commands and their options; how anything fails; what is imported; how long a list takes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tests.cli.processes import PROGRAM, run
from tests.cli.stores import write_checkpoint, write_store

import keepstep
from keepstep.cli.main import SUMMARIES, main

LOOKING = {
    "ls": ["path", "--json", "--metric", "--sort", "--reverse", "--last", "--damaged"],
    "show": ["path", "name", "--tensors", "--json"],
    "verify": ["path", "names", "--quick", "--json"],
}
LAUNCH_OPTIONS = [
    *("--config_file", "--cpu", "--multi_gpu", "--gpu_ids", "--num_processes", "--num_machines"),
    *("--machine_rank", "--main_process_ip", "--main_process_port", "--same_network"),
    *("--num_cpu_threads_per_process", "--mixed_precision", "--gradient_accumulation_steps"),
    *("--dynamo_backend", "--dynamo_mode", "--dynamo_use_fullgraph", "--dynamo_use_dynamic"),
    *("--dynamo_use_regional_compilation", "--debug", "--use_fsdp", "--fsdp_version"),
    *("--fsdp_reshard_after_forward", "--fsdp_offload_params", "--fsdp_auto_wrap_policy"),
    *("--fsdp_transformer_layer_cls_to_wrap", "--fsdp_min_num_params", "--fsdp_state_dict_type"),
    *("--fsdp_cpu_ram_efficient_loading", "--fsdp_sync_module_states", "--fsdp_activation_checkpointing"),
    *("--fsdp_sharding_strategy", "--fsdp_backward_prefetch", "--fsdp_forward_prefetch"),
    *("--fsdp_use_orig_params", "--max_restarts", "--monitor_interval", "--rdzv_backend", "--rdzv_conf"),
    *("--role", "--tee", "--log_dir", "--main_training_function", "--use_deepspeed", "--use_megatron_lm"),
    "--tpu",
]
COMMANDS = LOOKING | {
    "tune": [],
    "config": ["--config_file"],
    "env": ["--config_file"],
    "launch": [*LAUNCH_OPTIONS, "-m", "--no_python", "-q", "script", "arguments"],
    "test": LAUNCH_OPTIONS,
    "estimate-memory": ["path", "--dtypes", "--json"],
    "merge-weights": ["checkpoint_dir", "output_path", "--max_shard_size"],
}
LIST_SECONDS = 0.5


def command_of(name: str) -> click.Command:
    command = main.get_command(click.Context(main), name)  # type: ignore[attr-defined]
    assert command is not None
    return command


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "keepstep", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == f"keepstep {keepstep.__version__}\n"


def test_the_commands_and_options_are_these() -> None:
    assert list(SUMMARIES) == list(COMMANDS)
    for name, expected in COMMANDS.items():
        assert [p.opts[0] for p in command_of(name).params] == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_and_its_exit_codes(name: str) -> None:
    command = command_of(name)
    assert command.short_help == SUMMARIES[name]
    done = CliRunner().invoke(main, [name, "--help"])
    assert done.exit_code == 0
    assert SUMMARIES[name] in done.output.replace("\n  ", " ")
    assert "\n  Exit codes:\n    0  " in done.output
    assert "\n    2  " in done.output


def test_the_group_lists_its_commands_and_exit_codes() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "Exit codes:\n    0  " in done.stdout


def test_version() -> None:
    assert run("--version").stdout == f"keepstep {keepstep.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["ls", "s"], ["show", "s"], ["show", "s", "--tensors"], ["verify", "s"]],
)
def test_no_command_imports_torch_or_numpy_or_through_a_pipe_much_of_rich(
    workdir: Path, arguments: list[str]
) -> None:
    write_store(workdir / "s", 2)
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from keepstep.cli.main import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stderr.split())
    assert not {"torch", "numpy", "safetensors", "rich.console", "rich.table", "rich.progress"} & loaded
    others = {f"keepstep.cli.{name.replace('-', '_')}" for name in COMMANDS if name != arguments[0]}
    assert not others & loaded


def seconds_of_children() -> float:
    """Processor time of children that ended: what they take with a core to themselves."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("options", [[], ["--json"], ["--sort", "val_loss"]])
def test_a_thousand_checkpoints_are_listed_in_half_a_second(tmp_path: Path, options: list[str]) -> None:
    write_store(tmp_path, 1000)
    taken_s = []
    for _ in range(8):
        began = seconds_of_children()
        done = run("ls", tmp_path, *options)
        taken_s.append(seconds_of_children() - began)
        assert done.stdout.count("checkpoint_999") == (2 if options == ["--json"] else 1)
        if taken_s[-1] < LIST_SECONDS:
            return
    pytest.fail(f"keepstep ls took {min(taken_s):.2f} s at best; allowed: {LIST_SECONDS} s")


# ------------------------------------------------------------------------------------------ failing


@pytest.mark.parametrize("command", LOOKING)
@pytest.mark.parametrize("case", ["missing", "file", "empty", "looping link", "dangling link"])
def test_a_path_without_checkpoints_is_one_line_and_exit_code_2(
    workdir: Path, command: str, case: str
) -> None:
    path = workdir / "p"
    if case == "file":
        path.write_text("x")
    elif case == "empty":
        path.mkdir()
    elif case == "looping link":
        path.symlink_to(path)
    elif case == "dangling link":
        path.symlink_to("nowhere")
    for arguments in ([command, "p"], [command, "p", "--json"]):
        done = run(*arguments, cwd=workdir)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("keepstep: ")
        assert done.stderr.count("\n") == 1
        assert "p" in done.stderr


def test_an_unknown_command_or_option_is_exit_code_2() -> None:
    assert run("list").returncode == 2
    assert run("ls", "--nope").returncode == 2
    assert run("ls", "--last", "-1").returncode == 2


def test_a_directory_that_may_not_be_read(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 1)
    store.chmod(0)
    code = "import os\nif os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n" + PROGRAM[2]
    imports_first = "import keepstep.cli.ls, encodings.idna, locale\n"  # nobody may not read the source tree
    try:
        done = subprocess.run(
            [sys.executable, "-c", imports_first + code, "ls", store],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        store.chmod(0o755)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("keepstep: ")
    assert "Permission denied" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"run\xff\xfe")
    write_store(directory / "checkpoints", 1)
    for arguments in (["ls"], ["show"], ["verify"], ["ls", "--json"]):
        done = run(*arguments, os.fsencode(directory))
        assert (done.returncode, done.stderr) == (0, "")
    done = run("show", os.fsencode(directory))
    assert r"run\xff\xfe" in done.stdout
    missing = run("ls", os.fsencode(directory) + b"/\xfd")
    assert missing.returncode == 2
    assert r"\xfd" in missing.stderr


def test_a_checkpoint_directory_with_an_odd_name(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "a\x1b[31m\nb")
    for command in LOOKING:
        done = run(command, directory)
        assert done.returncode == 0
        assert r"a\x1b[31m\nb" in done.stdout
        assert "\x1b" not in done.stdout


@pytest.mark.parametrize("command", [["ls"], ["ls", "--json"], ["show", "--tensors"], ["verify"]])
def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path, command: list[str]) -> None:
    tensors = {f"layer.{number}.weight": ("float32", (1,)) for number in range(2000)}
    write_store(tmp_path / "s", 3)
    write_checkpoint(tmp_path / "s" / "checkpoint_7", tensors=tensors)
    process = subprocess.Popen(
        [*PROGRAM, command[0], tmp_path / "s", *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()  # before a byte was written
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_an_old_terminal_gets_escapes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoint_0", metrics={"损失": 1.0})
    done = subprocess.run(
        [*PROGRAM, "ls", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u635f\u5931" in done.stdout
