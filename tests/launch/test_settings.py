"""Configuration files: keepstep's own, and those that Accelerate itself wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.config.default import write_basic_config

from keepstep.errors import UsageError
from keepstep.launch.settings import Settings, read_settings, settings_of, write_settings


@pytest.mark.parametrize("name", ["c.yaml", "c.json", "sub/c.yml"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    settings = Settings(
        distributed_type="FSDP",
        num_processes=2,
        mixed_precision="bf16",
        use_cpu=True,
        main_process_port=0,
        fsdp_config={"fsdp_reshard_after_forward": "true", "fsdp_min_num_params": "1000"},
        dynamo_config={"dynamo_backend": "INDUCTOR"},
        unsupported={"tpu_name": "t"},
    )
    write_settings(settings, tmp_path / name)
    assert read_settings(tmp_path / name) == settings


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_accelerate_reads_what_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"c.{suffix}"
    write_settings(Settings(distributed_type="MULTI_CPU", num_processes=2, use_cpu=True), path)
    read = ClusterConfig.from_json_file if suffix == "json" else ClusterConfig.from_yaml_file
    config = read(str(path))
    assert (config.num_processes, config.use_cpu, str(config.distributed_type)) == (
        2,
        True,
        "DistributedType.MULTI_CPU",
    )


def test_accelerates_own_files_are_understood(tmp_path: Path) -> None:
    basic = tmp_path / "basic.json"
    assert write_basic_config(mixed_precision="bf16", save_location=str(basic))
    assert read_settings(basic).mixed_precision == "bf16"
    asked = tmp_path / "asked.yaml"
    config = ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="FSDP",
        mixed_precision="fp16",
        use_cpu=False,
        debug=True,
        num_processes=8,
        num_machines=2,
        machine_rank=1,
        main_process_ip="10.0.0.1",
        main_process_port=4000,
        gpu_ids="all",
        fsdp_config={
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_activation_checkpointing": False,
        },
        dynamo_config={"dynamo_backend": "INDUCTOR"},
    )
    config.to_yaml_file(str(asked))
    settings = read_settings(asked)
    assert settings == Settings(
        distributed_type="FSDP",
        num_processes=8,
        num_machines=2,
        machine_rank=1,
        main_process_ip="10.0.0.1",
        main_process_port=4000,
        mixed_precision="fp16",
        gpu_ids="all",
        debug=True,
        rdzv_backend="static",
        same_network=False,
        fsdp_config={
            "fsdp_version": "2",
            "fsdp_reshard_after_forward": "true",
            "fsdp_activation_checkpointing": "false",
        },
        dynamo_config={"dynamo_backend": "INDUCTOR"},
    )


def test_what_keepstep_has_not_is_kept_to_be_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    config = ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type="DEEPSPEED",
        mixed_precision="no",
        use_cpu=False,
        debug=False,
        num_processes=2,
        deepspeed_config={"zero_stage": 3},
    )
    config.to_yaml_file(str(path))
    settings = read_settings(path)
    assert settings.distributed_type == "DEEPSPEED"
    assert settings.unsupported == {"deepspeed_config": {"zero_stage": 3}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"fp16": True}, {"mixed_precision": "fp16"}),
        ({"dynamo_backend": "EAGER"}, {"dynamo_config": {"dynamo_backend": "EAGER"}}),
        ({"dynamo_backend": False}, {"dynamo_config": {"dynamo_backend": "no"}}),
        (
            {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": ["A", "B"]}},
            {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "A,B"}},
        ),
        ({"num_processes": -1}, {"num_processes": None}),
        ({"distributed_type": False}, {"distributed_type": "NO"}),
        ({"gpu_ids": [0, 1]}, {"gpu_ids": "0,1"}),
        ({"gpu_ids": 0}, {"gpu_ids": "0"}),
        ({"downcast_bf16": "no", "tpu_env": [], "tpu_use_sudo": False}, {"unsupported": {}}),
        ({"num_processes": "2", "main_process_port": "0"}, {"num_processes": 2, "main_process_port": 0}),
        ({"main_process_ip": None}, {"main_process_ip": None}),
    ],
)
def test_spellings(found: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = settings_of(found, "test")
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_proceses: 2", r"num_proceses. Allowed: .*num_processes"),
        ("num_processes: 0", "num_processes is 0; .* at least 1"),
        ("num_processes: two", "num_processes is 'two'"),
        ("num_processes: true", "num_processes is True"),
        ("use_cpu: perhaps", "use_cpu is 'perhaps'; expected true or false"),
        ("mixed_precision: fp61", "mixed_precision is 'fp61'; expected one of no, fp16, bf16, fp8"),
        ("main_process_port: 70000", "70000.*65535"),
        ("gpu_ids: 0;1", "gpu_ids is '0;1'"),
        ("fsdp_config: 3", "fsdp_config is 3"),
        ("fsdp_config: {version: 2}", "do not begin with fsdp_: version"),
        ("- a", "holds no names"),
        ("a: [", "cannot be read"),
    ],
)
def test_mistakes_are_named_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        read_settings(path)
    assert str(path) in str(caught.value)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xb8\xff")
    for place in (tmp_path, tmp_path / "c.yaml"):
        with pytest.raises(UsageError, match=f"{place} cannot be read"):
            read_settings(place)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no configuration file .*keepstep config --config_file"):
        read_settings(tmp_path / "none.yaml")


def test_json_that_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"debug": True})[:-1])
    with pytest.raises(UsageError, match="cannot be read"):
        read_settings(path)
