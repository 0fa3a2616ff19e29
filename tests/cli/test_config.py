"""`keepstep config` and `keepstep env`: answers become a file that launches read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from click.testing import CliRunner, Result
from tests.cli.processes import run

from keepstep.cli.main import main
from keepstep.launch.settings import Settings, read_settings
from keepstep.utils import write_basic_config


@pytest.fixture
def home(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEEPSTEP_HOME", str(workdir / "home"))
    return workdir / "home" / "default_config.yaml"


def answer(*answers: str, arguments: tuple[str, ...] = ()) -> Result:
    return CliRunner().invoke(main, ["config", *arguments], input="\n".join(answers) + "\n")


def test_every_default_is_a_launch_of_one_process(home: Path) -> None:
    result = answer(*[""] * 8)
    assert result.exit_code == 0, result.output
    assert f"The configuration is in {home}" in result.output
    settings = read_settings(home)
    assert settings == Settings(distributed_type="NO", num_processes=1, gpu_ids="all", mixed_precision="no")


def test_answers_about_several_machines_and_sharding(home: Path, workdir: Path) -> None:
    result = answer(
        *("several machines", "3", "2", "10.0.0.7", "6000", "c10d"),
        *("no", "12", "0,1,2,3", "yes"),
        *("no", "yes", "", "size_based_wrap", "1000", ""),
        *("inductor", "reduce-overhead", "", "yes"),
        *("bf16", "yes"),
        arguments=("--config_file", "own.json"),
    )
    assert result.exit_code == 0, result.output
    assert not home.exists()
    assert read_settings(workdir / "own.json") == Settings(
        num_machines=3,
        machine_rank=2,
        main_process_ip="10.0.0.7",
        main_process_port=6000,
        num_processes=12,
        gpu_ids="0,1,2,3",
        distributed_type="FSDP",
        rdzv_backend="c10d",
        debug=True,
        mixed_precision="bf16",
        dynamo_config={
            "dynamo_backend": "INDUCTOR",
            "dynamo_mode": "reduce-overhead",
            "dynamo_use_dynamic": "false",
            "dynamo_use_fullgraph": "true",
        },
        fsdp_config={
            "fsdp_version": "2",
            "fsdp_reshard_after_forward": "false",
            "fsdp_offload_params": "true",
            "fsdp_activation_checkpointing": "false",
            "fsdp_auto_wrap_policy": "SIZE_BASED_WRAP",
            "fsdp_min_num_params": "1000",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
    )


def test_a_wrong_answer_is_asked_again(home: Path) -> None:
    result = answer("somewhere", "this machine", "yes", "0", "2", "no", "", "fp61", "fp16", "")
    assert result.exit_code == 0, result.output
    assert "'somewhere' is not one of" in result.output
    settings = read_settings(home)
    assert (settings.distributed_type, settings.num_processes) == ("MULTI_CPU", 2)
    assert (settings.use_cpu, settings.mixed_precision) == (True, "fp16")


def test_default_asks_nothing_and_overwrites_nothing(home: Path) -> None:
    result = CliRunner().invoke(main, ["config", "default", "--mixed_precision", "bf16"])
    assert result.exit_code == 0, result.output
    assert read_settings(home).mixed_precision == "bf16"
    again = CliRunner().invoke(main, ["config", "default", "--mixed-precision", "no"])
    assert again.exit_code == 2
    assert "There is a configuration" in again.output
    assert "keepstep config update" in again.output
    assert read_settings(home).mixed_precision == "bf16"


def test_write_basic_config_from_python(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_basic_config(mixed_precision="bf16") == home
    assert read_settings(home).mixed_precision == "bf16"
    assert write_basic_config() is False
    assert "already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="use_xpu"):
        write_basic_config(use_xpu=True)
    with pytest.raises(ValueError, match="mixed_precision is 'fp61'"):
        write_basic_config("fp61", save_location=home.parent / "other.yaml")


def test_update_rewrites_a_file_of_accelerates(workdir: Path) -> None:
    path = workdir / "a.yaml"
    options: dict[str, Any] = {"distributed_type": "MULTI_CPU", "mixed_precision": "no", "use_cpu": True}
    ClusterConfig(compute_environment="LOCAL_MACHINE", debug=False, num_processes=2, **options).to_yaml_file(
        str(path)
    )
    before = read_settings(path)
    result = CliRunner().invoke(main, ["config", "update", "--config_file", str(path)])
    assert result.exit_code == 0, result.output
    assert read_settings(path) == before
    assert "downcast_bf16" not in path.read_text()
    missing = CliRunner().invoke(main, ["config", "update", "--config_file", "none.yaml"])
    assert missing.exit_code == 2


def test_env_tells_versions_and_the_configuration(home: Path) -> None:
    done = run("env")
    assert done.returncode == 0, done.stderr
    assert "- torch: 2" in done.stdout
    assert "Configuration: none" in done.stdout
    write_basic_config("bf16")
    assert "    mixed_precision: bf16" in run("env").stdout
    assert run("env", "--config_file", "none.yaml").returncode == 2
