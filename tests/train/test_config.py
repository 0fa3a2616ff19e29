from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from keepstep import Accelerator, CheckpointPolicy, ProjectConfiguration
from keepstep.errors import UsageError
from keepstep.train.settings.config import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    GradScalerKwargs,
)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_steps": True}, "every_n_steps"),
        ({"every_s": 0}, "every_s"),
        ({"every_s": "10"}, "every_s"),
        ({"max_overhead": 1.0}, "max_overhead"),
        ({"max_overhead": "5%"}, "max_overhead"),
        ({"mean_time_between_failures_s": "1h"}, "mean_time_between_failures_s"),
        ({"keep_best": 3}, "keep_best"),
        ({"keep_best": ["loss", "min", 1]}, "keep_best"),
        ({"keep_last": 0}, "keep_last"),
        ({"keep_best": ("loss", "least", 1)}, "keep_best"),
        ({"keep_best": ("loss", "min", 0)}, "keep_best"),
        ({"keep_every_n_steps": -1}, "keep_every_n_steps"),
        ({"byte_budget": 0}, "byte_budget"),
        ({"keep_within_s": 0}, "keep_within_s"),
        ({"scrub_interval_s": -1}, "scrub_interval_s"),
        ({"when_busy": "later"}, "when_busy"),
        ({"staging": "sometimes"}, "staging"),
        ({"memory_budget_bytes": 1000}, "memory_budget_bytes"),
        ({"mean_time_between_failures_s": 0}, "mean_time_between_failures_s"),
        ({"mean_time_between_failures_s": float("inf")}, "mean_time_between_failures_s"),
    ],
)
def test_impossible_policies(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        CheckpointPolicy(**options)
    assert repr(next(iter(options.values()))) in str(caught.value)


@pytest.mark.parametrize("field", ["every_n_steps", "every_s"])
def test_what_says_when_to_save_stands_alone(field: str) -> None:
    with pytest.raises(UsageError, match=f"mean_time_between_failures_s=3600, {field}=7"):
        CheckpointPolicy(mean_time_between_failures_s=3600, **{field: 7})  # type: ignore[arg-type]
    assert CheckpointPolicy(mean_time_between_failures_s=3600).max_overhead is None
    assert CheckpointPolicy(mean_time_between_failures_s=3600, max_overhead=0.1).max_overhead == 0.1


def test_a_policy_without_interval_is_spaced_by_cost() -> None:
    assert CheckpointPolicy().max_overhead == 0.01
    assert CheckpointPolicy(every_n_steps=5).max_overhead is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        CheckpointPolicy().keep_last = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixed_precision": "fp8"}, "torchao"),
        ({"mixed_precision": "half"}, "no, bf16, fp16"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        (
            {
                "gradient_accumulation_steps": 2,
                "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=3),
            },
            "gradient_accumulation_plugin",
        ),
        ({"kwargs_handlers": ["x"]}, "GradScalerKwargs"),
        ({"project_dir": "a", "project_config": ProjectConfiguration(project_dir="b")}, "project_dir"),
        (
            {
                "project_config": ProjectConfiguration(total_limit=2),
                "checkpoint_policy": CheckpointPolicy(keep_last=3),
            },
            r"total_limit=2.*keep_last=3",
        ),
    ],
)
def test_impossible_accelerators(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Accelerator(cpu=True, **options)


def test_impossible_projects() -> None:
    for options in ({"total_limit": 0}, {"iteration": 4}, {"save_on_each_node": True}):
        with pytest.raises(UsageError, match=next(iter(options))):
            ProjectConfiguration(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="num_steps"):
        GradientAccumulationPlugin(num_steps=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split_batches": 2}, r"split_batches=2\): split_batches must be True or False"),
        ({"even_batches": None}, "even_batches=None"),
        ({"dispatch_batches": "yes"}, "dispatch_batches='yes'.*True, False or None"),
        ({"data_seed": 1.5}, "data_seed=1.5"),
        ({"use_stateful_dataloader": "no"}, "use_stateful_dataloader='no'"),
    ],
)
def test_impossible_loading(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        DataLoaderConfiguration(**options)


def test_loading_is_said_in_either_place() -> None:
    given = Accelerator(cpu=True, split_batches=True, even_batches=False, dispatch_batches=True)
    configured = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, even_batches=False, dispatch_batches=True
        ),
    )
    assert given._parts.loading == configured._parts.loading
    assert given.split_batches
    with pytest.raises(UsageError, match=r"dispatch_batches=False\) and .*dispatch_batches=True"):
        Accelerator(
            cpu=True,
            dispatch_batches=False,
            dataloader_config=DataLoaderConfiguration(dispatch_batches=True),
        )


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE=2"):
        Accelerator(cpu=True)


def test_the_environment_fills_what_was_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPSTEP_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("KEEPSTEP_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setenv("KEEPSTEP_USE_CPU", "yes")
    accelerator = Accelerator()
    assert accelerator.mixed_precision == "bf16"
    assert accelerator.gradient_accumulation_steps == 3
    assert accelerator.device == torch.device("cpu")
    assert Accelerator(mixed_precision="no").mixed_precision == "no"
    assert Accelerator(gradient_accumulation_steps=2).gradient_accumulation_steps == 2
    monkeypatch.setenv("KEEPSTEP_GRADIENT_ACCUMULATION_STEPS", "many")
    with pytest.raises(UsageError, match="'many'"):
        Accelerator()
    monkeypatch.setenv("KEEPSTEP_USE_CPU", "perhaps")
    with pytest.raises(UsageError, match="'perhaps'"):
        Accelerator()


def test_project_directories(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    assert accelerator.project_dir == accelerator.logging_dir == tmp_path
    configured = Accelerator(
        cpu=True, project_dir=tmp_path, project_config=ProjectConfiguration(logging_dir="logs", total_limit=2)
    )
    assert configured.project_dir == tmp_path
    assert configured.logging_dir == "logs"
    assert not list(tmp_path.iterdir())


def test_seed_and_scaler_options() -> None:
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="fp16",
        dataloader_config=DataLoaderConfiguration(data_seed=5),
        kwargs_handlers=[GradScalerKwargs(init_scale=8.0)],
    )
    state = accelerator._state.capture().shared["train"]["run"]
    assert state["seed"] == 5
    assert state["scaler"]["scale"] == 8.0


def test_policies_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a CheckpointPolicy of keepstep's"):
        Accelerator(project_dir=tmp_path, checkpoint_policy={"every_n_steps": 5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device_placement", "cpu"),
        ("step_scheduler_with_optimizer", 2),
        ("fsdp_plugin", True),
        ("gradient_accumulation_plugin", 4),
        ("dataloader_config", {"even_batches": False}),
        ("project_config", "runs"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"^{option} is {value!r}, a builtins.*; expected "):
        Accelerator(**{"cpu": True, option: value})
