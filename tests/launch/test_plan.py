"""Settings, options and facts -> a plan, which is looked at and never run."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from tests.launch.machines import Imagined

from keepstep.errors import UsageError
from keepstep.launch.plan import LaunchPlan, Manner, Script, override, plan_launch
from keepstep.launch.settings import Settings
from keepstep.train.settings.environment import read_environment

SCRIPT = Script(target="train.py", arguments=("--lr", "0.1"))


def plan_of(machine: Imagined | None = None, manner: Manner | None = None, **settings: Any) -> LaunchPlan:
    return plan_launch(Settings(**settings), SCRIPT, manner or Manner(), machine or Imagined())


def test_the_cpu_and_two_processes_are_two_processes() -> None:
    plan = plan_of(use_cpu=True, num_processes=2)
    assert (plan.processes, plan.machines, plan.device) == (2, 1, "cpu")
    assert plan.rendezvous is not None
    assert (plan.rendezvous.backend, plan.rendezvous.endpoint) == ("c10d", "127.0.0.1:0")
    assert plan.command == (sys.executable, "-u", "train.py", "--lr", "0.1")


def test_one_process_needs_no_group_and_nobody_counts_gpus() -> None:
    machine = Imagined(gpu_count=4)
    plan = plan_of(machine, num_processes=1)
    assert (plan.processes, plan.rendezvous, plan.environment) == (1, None, {})
    assert plan_of(machine, use_cpu=True).processes == 1
    assert machine.asked == 0


@pytest.mark.parametrize(
    ("gpus", "settings", "processes", "device"),
    [
        (4, {}, 4, "gpu"),
        (1, {}, 1, "gpu"),
        (0, {}, 1, "cpu"),
        (4, {"gpu_ids": "1,3"}, 2, "gpu"),
        (4, {"gpu_ids": "all"}, 4, "gpu"),
        (4, {"num_processes": 2}, 2, "gpu"),
        (0, {"num_processes": 3}, 3, "cpu"),
        (4, {"use_cpu": True, "gpu_ids": "0,1", "num_processes": 3}, 3, "cpu"),
        (4, {"distributed_type": "MULTI_CPU", "num_processes": 8}, 8, "cpu"),
    ],
)
def test_how_many_processes_and_where(
    gpus: int, settings: dict[str, Any], processes: int, device: str
) -> None:
    plan = plan_of(Imagined(gpu_count=gpus), **settings)
    assert (plan.processes, plan.device) == (processes, device)


def test_a_machine_without_gpus_is_told_so() -> None:
    assert "no GPU" in " ".join(plan_of(num_processes=2).notes)
    assert plan_of(num_processes=2, use_cpu=True).notes == ()


def test_each_setting_reaches_the_script_under_the_name_that_training_reads() -> None:
    """The names are told twice, here and in `train.settings.environment`; this holds them together."""
    settings = Settings(
        num_processes=2,
        use_cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=4,
        debug=True,
        distributed_type="FSDP",
        fsdp_config={"fsdp_reshard_after_forward": "true", "fsdp_min_num_params": "1000"},
        dynamo_config={"dynamo_backend": "inductor", "dynamo_mode": "default"},
    )
    told = plan_launch(settings, SCRIPT, Manner(), Imagined()).environment
    read = read_environment(told)
    assert read.use_cpu
    assert read.mixed_precision == "bf16"
    assert read.gradient_accumulation_steps == 4
    assert read.debug
    assert read.use_fsdp
    assert read.fsdp == {"reshard_after_forward": "true", "min_num_params": "1000"}
    assert read.dynamo == {"backend": "inductor", "mode": "default"}


def test_what_is_not_said_is_not_told() -> None:
    assert (
        plan_of(Imagined(gpu_count=1), fsdp_config={}, dynamo_config={"dynamo_backend": "NO"}).environment
        == {}
    )


def test_threads_are_divided_unless_somebody_said_how_many() -> None:
    two = {"use_cpu": True, "num_processes": 2}
    assert plan_of(Imagined(cpus=8), **two).environment["OMP_NUM_THREADS"] == "4"
    assert plan_of(Imagined(cpus=1), **two).environment["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in plan_of(Imagined(variables={"OMP_NUM_THREADS": "3"}), **two).environment
    assert plan_of(manner=Manner(cpu_threads=5), **two).environment["OMP_NUM_THREADS"] == "5"


def test_several_machines_meet_at_the_first_ones_address() -> None:
    many = {"num_machines": 2, "num_processes": 8, "main_process_ip": "10.0.0.1"}
    plan = plan_of(Imagined(gpu_count=4), machine_rank=1, main_process_port=4000, **many)
    assert (plan.processes, plan.machine_rank) == (4, 1)
    assert plan.rendezvous is not None
    assert plan.rendezvous.endpoint == "10.0.0.1:4000"
    assert (plan.rendezvous.backend, plan.rendezvous.conf["rank"]) == ("static", 1)
    assert "GLOO_SOCKET_IFNAME" not in plan.environment
    without_port = plan_of(Imagined(gpu_count=4), **many).rendezvous
    assert without_port is not None
    assert without_port.endpoint == "10.0.0.1:29500"
    other = plan_of(Imagined(gpu_count=4), rdzv_backend="c10d", **many).rendezvous
    assert other is not None
    assert (other.backend, other.run_id, "rank" in other.conf) == ("c10d", "keepstep", False)


def test_a_port_that_was_asked_for_is_taken_or_refused() -> None:
    two = {"use_cpu": True, "num_processes": 2}
    rendezvous = plan_of(main_process_port=4000, **two).rendezvous
    assert rendezvous is not None
    assert rendezvous.endpoint == "127.0.0.1:4000"
    with pytest.raises(UsageError, match=r"Port 4000 .* in use.* 0 for one that is free"):
        plan_of(Imagined(busy_ports=(4000,)), main_process_port=4000, **two)
    machines = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
    other = plan_of(Imagined(busy_ports=(4000,)), main_process_port=4000, **machines, **two).rendezvous
    assert other is not None, "it is in use here, and machine 0 is where it counts"
    free = plan_of(Imagined(busy_ports=(29500,)), main_process_port=0, **two).rendezvous
    assert free is not None
    assert free.endpoint == "127.0.0.1:0"


@pytest.mark.parametrize(
    ("gpus", "settings", "manner", "words"),
    [
        (0, {"num_machines": 2, "machine_rank": 2}, {}, "from 0 to 1"),
        (0, {"num_machines": 2}, {}, "main_process_ip is not said"),
        (0, {"num_machines": 2, "num_processes": 3, "main_process_ip": "a"}, {}, "multiple"),
        (2, {"num_processes": 3}, {}, "3 processes .* 2 GPUs.*--num_processes 2"),
        (4, {"num_processes": 3, "gpu_ids": "0,1"}, {}, "3 processes .* 2 GPUs"),
        (0, {"gpu_ids": "0"}, {}, "gpu_ids .* has none"),
        (0, {"distributed_type": "MULTI_GPU"}, {}, "has none .*--cpu"),
        (0, {}, {"wants_gpus": True}, "--multi_gpu"),
        (4, {"use_cpu": True}, {"wants_gpus": True}, "Leave one out"),
        (0, {"distributed_type": "DEEPSPEED"}, {}, "DeepSpeed.*--use_fsdp"),
        (0, {"distributed_type": "MEGATRON_LM"}, {}, "Megatron-LM.*FSDP"),
        (0, {"distributed_type": "XLA"}, {}, "TPUs"),
        (0, {"distributed_type": "MULTI_NPU"}, {}, "'MULTI_NPU'.*CUDA GPUs"),
        (0, {"mixed_precision": "fp8"}, {}, "fp8.*torchao.*bf16"),
        (0, {"compute_environment": "AMAZON_SAGEMAKER"}, {}, "LOCAL_MACHINE"),
        (0, {"unsupported": {"deepspeed_config": {"zero_stage": 2}}}, {}, "deepspeed_config.*FSDP2"),
        (0, {"unsupported": {"tpu_name": "t"}}, {}, "tpu_name.*TPUs"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    gpus: int, settings: dict[str, Any], manner: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        plan_of(Imagined(gpu_count=gpus), Manner(**manner), **settings)


def test_options_override_the_file_and_sections_entry_by_entry() -> None:
    file = Settings(
        num_processes=4,
        mixed_precision="bf16",
        fsdp_config={"fsdp_version": "2", "fsdp_offload_params": "true"},
    )
    settings = override(
        file,
        {"num_processes": 2, "mixed_precision": None, "fsdp_offload_params": "false", "fsdp_version": None},
    )
    assert (settings.num_processes, settings.mixed_precision) == (2, "bf16")
    assert settings.fsdp_config == {"fsdp_version": "2", "fsdp_offload_params": "false"}


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("file", (sys.executable, "-u", "a", "-b")),
        ("module", (sys.executable, "-u", "-m", "a", "-b")),
        ("program", ("a", "-b")),
    ],
)
def test_the_command_line_of_a_rank(kind: str, command: tuple[str, ...]) -> None:
    assert Script(target="a", arguments=("-b",), kind=kind).command == command
