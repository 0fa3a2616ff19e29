"""What scripts import from `accelerate.utils` and `accelerate.tracking`: there, or known to be missing."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import accelerate.tracking
import accelerate.utils as theirs
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import keepstep.tracking
import keepstep.utils as ours
from keepstep import Accelerator, cpu_offload, disk_offload
from keepstep.errors import CheckpointNotFoundError, MissingPackageError, UsageError

OF_WHAT_IS_NOT_SUPPORTED = """
deepspeed megatron fp8 bnb 4bit 8bit bitsandbytes _ao ao_ xla tpu sagemaker sagemager msamp _te_ bert gpt
t5 fsdp parallelism context tensorparallel _tp_ numa torchao transformer_engine gaudi mita xpu quantiz
rocm p2p pippy neuron aorecipe terecipe abstracttrainstep avg_losses gatheredparameters
"""

LEFT_OUT = """
CannotPadNestedTensorWarning ComputeEnvironment CustomDtype PrefixedDataset PrepareForLaunch
TORCH_DISTRIBUTED_OPERATION_TYPES TORCH_LAUNCH_PARAMS are_libraries_initialized calculate_maximum_sizes
check_os_kernel check_tied_parameters_in_config check_tied_parameters_on_same_device
clean_state_dict_for_safetensors compile_regions convert_bytes convert_dict_to_env_variables convert_model
copy_tensor_to_devices ensure_weights_retied filter_first_and_last_linear_layers
get_cpu_distributed_information get_current_device_type get_gpu_info get_grad_scaler
get_module_children_bottom_up get_pretty_name has_compiled_regions
id_tensor_storage is_amdsmi_available is_import_timer_available is_port_in_use is_xccl_available
load_offloaded_weight model_has_dtensor pad_input_tensors prepare_multi_gpu_env
prepare_simple_launcher_cmd_env purge_accelerate_environment recursive_getattr
"""


def names_of(module: Any) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }


def test_all_names_are_there_or_told_to_be_missing() -> None:
    missing = names_of(theirs) - set(ours.__all__)
    words = OF_WHAT_IS_NOT_SUPPORTED.split()
    unsupported = {name for name in missing if any(word in name.lower() for word in words)}
    assert sorted(missing - unsupported) == sorted(LEFT_OUT.split(), key=str)
    for name in ours.__all__:
        assert getattr(ours, name) is not None


def test_constants_are_theirs() -> None:
    names = [name for name in names_of(theirs) & set(ours.__all__) if name.isupper()]
    assert len(names) >= 13
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}


def test_what_is_installed_is_what_they_say() -> None:
    told_otherwise = {"is_fp16_available", "is_deepspeed_available", "is_rich_available"}
    checks = [name for name in set(ours.__all__) & names_of(theirs) if name.endswith("_available")]
    for name in sorted(set(checks) - told_otherwise):
        assert bool(getattr(ours, name)()) == bool(getattr(theirs, name)()), name
    assert len(checks) > 45


@pytest.mark.parametrize(
    ("handler", "options"),
    [
        ("AutocastKwargs", {"cache_enabled": False}),
        ("GradScalerKwargs", {"init_scale": 8.0}),
        ("InitProcessGroupKwargs", {}),
        ("ProfileKwargs", {"with_flops": True}),
    ],
)
def test_handlers_are_handlers(handler: str, options: dict[str, Any]) -> None:
    mine = getattr(ours, handler)(**options)
    assert isinstance(mine, ours.KwargsHandler)
    assert mine.to_kwargs().items() >= options.items()


def test_dicts_merge_as_theirs_do() -> None:
    source, destination = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}, {"a": {"b": 0, "x": 9}, "y": 3}
    expected = theirs.merge_dicts(source, {"a": {"b": 0, "x": 9}, "y": 3})
    assert ours.merge_dicts(source, destination) == expected
    assert destination == expected


def test_weights_are_loaded_by_name(tmp_path: Path) -> None:
    weights = {"inner.weight": torch.arange(4.0), "outer.weight": torch.ones(2)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = ours.load_state_dict(
        str(tmp_path / "model.safetensors"), device_map={"inner": "meta", "": "cpu"}
    )
    assert loaded["inner.weight"].device.type == "meta"
    torch.testing.assert_close(loaded["outer.weight"], weights["outer.weight"])
    assert [ours.dtype_byte_size(kind) for kind in (torch.float32, torch.bfloat16, torch.int8)] == [4, 2, 1]


def test_a_value_is_saved_by_the_main_process(tmp_path: Path) -> None:
    ours.save({"w": torch.ones(2)}, tmp_path / "w.safetensors", safe_serialization=True)
    torch.testing.assert_close(load_file(tmp_path / "w.safetensors"), {"w": torch.ones(2)})


def test_shards_are_merged_and_may_go(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    save_file({"w": torch.ones(2)}, shards / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="outside of it"):
        ours.merge_fsdp_weights(shards, shards / "merged", remove_checkpoint_dir=True)
    with pytest.raises(UsageError, match="pickle"):
        ours.merge_fsdp_weights(shards, tmp_path / "merged", safe_serialization=False)
    ours.merge_fsdp_weights(shards, tmp_path / "merged", remove_checkpoint_dir=True)
    assert load_file(tmp_path / "merged" / "model.safetensors")["w"].tolist() == [1, 1]
    assert not shards.exists()


def test_weights_go_to_a_folder_and_into_a_model(tmp_path: Path) -> None:
    index = ours.offload_weight(torch.full((2, 2), 5.0), "weight", tmp_path)
    assert ours.offload_weight(torch.full((2,), 6.0), "bias", tmp_path, index) is index
    assert sorted(index) == ["bias", "weight"]
    ours.save_offload_index(index, tmp_path)
    model = nn.Linear(2, 2)
    ours.load_offloaded_weights(model, index, tmp_path)
    assert (model.weight.unique().tolist(), model.bias.unique().tolist()) == ([5.0], [6.0])
    with pytest.raises(CheckpointNotFoundError, match="other"):
        ours.load_offloaded_weights(model, {"other": {}}, tmp_path)
    ours.load_offloaded_weights(model, {}, tmp_path / "nowhere")


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_weights_are_brought_for_a_block(offload: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    expected = model[0].weight.detach().clone()
    where = {"offload_dir": tmp_path} if offload is disk_offload else {}
    offload(model, execution_device="cpu", **where)
    assert ours.has_offloaded_params(model[0])
    assert model[0].weight.device.type == "meta"

    def look_and_fail() -> None:
        with ours.align_module_device(model[0]):
            torch.testing.assert_close(model[0].weight.detach(), expected)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()
    assert model[0].weight.device.type == "meta"
    assert model(torch.ones(1, 2)).device.type == "cpu"


def test_other_weights_are_moved_and_come_back() -> None:
    layer = nn.Linear(2, 2)
    assert not ours.has_offloaded_params(layer)
    weight = layer.weight
    with ours.align_module_device(layer, "cpu"), torch.no_grad():
        layer.weight.fill_(3)
    with ours.align_module_device(layer):
        assert layer.weight is weight
    assert layer.weight.unique().tolist() == [3]


def test_compiled_modules_and_those_of_peft_are_told() -> None:
    layer = nn.Linear(2, 2)
    assert not ours.is_compiled_module(layer)
    assert ours.is_compiled_module(torch.compile(layer))
    assert not ours.is_peft_model(layer)


def test_trackers_are_filtered(tmp_path: Path) -> None:
    class Own(keepstep.tracking.GeneralTracker):
        name = "own"
        requires_logging_directory = False
        tracker = None

    own = Own()
    assert keepstep.tracking.filter_trackers(["csv", own, "csv"], tmp_path) == ["csv", own]
    assert keepstep.tracking.filter_trackers(None) == []
    with pytest.raises((MissingPackageError, UsageError), match="aim"):
        keepstep.tracking.filter_trackers("aim")
    assert "filter_trackers" in names_of(accelerate.tracking)


def test_arguments_that_change_nothing_are_taken(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 2))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = accelerator.prepare_optimizer(plain, device_placement=True)
    assert optimizer.optimizer is plain
    assert accelerator.should_save_model
    assert not accelerator.verify_device_map(model)
    model.hf_device_map = {"a": 0, "b": "cpu"}
    assert accelerator.verify_device_map(model)
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state", map_location="cpu", strict=True)
    accelerator.load_state(tmp_path / "state", {"weights_only": True})
    for options in ({"strict": False}, {"load_module_only": True}):
        with pytest.raises(UsageError, match="load_checkpoint_in_model"):
            accelerator.load_state(tmp_path / "state", **options)
