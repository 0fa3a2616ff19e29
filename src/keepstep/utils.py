"""Names that scripts import from `accelerate.utils`, each from where it lives."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME_OF_NAME = {
    "AutocastKwargs": "keepstep.train.settings.plugins",
    "DDPCommunicationHookType": "keepstep.train.settings.plugins",
    "DataLoaderConfiguration": "keepstep.train.settings.config",
    "DistributedDataParallelKwargs": "keepstep.train.settings.plugins",
    "DistributedType": "keepstep.train.ranks.process",
    "DynamoBackend": "keepstep.train.settings.plugins",
    "FullyShardedDataParallelPlugin": "keepstep.train.settings.plugins",
    "GradScalerKwargs": "keepstep.train.settings.config",
    "GradientAccumulationPlugin": "keepstep.train.settings.config",
    "InitProcessGroupKwargs": "keepstep.train.settings.plugins",
    "LoggerType": "keepstep.track.registry",
    "OffloadedWeightsLoader": "keepstep.models.offload",
    "PrecisionType": "keepstep.train.settings.plugins",
    "ProfileKwargs": "keepstep.train.settings.plugins",
    "ProjectConfiguration": "keepstep.train.settings.config",
    "RNGType": "keepstep.train.settings.plugins",
    "SAFE_WEIGHTS_INDEX_NAME": "keepstep.models.names",
    "SAFE_WEIGHTS_NAME": "keepstep.models.names",
    "TensorInformation": "keepstep.train.ranks.tensors",
    "TorchDynamoPlugin": "keepstep.train.settings.plugins",
    "WEIGHTS_INDEX_NAME": "keepstep.models.names",
    "WEIGHTS_NAME": "keepstep.models.names",
    "broadcast": "keepstep.train.ranks.operations",
    "broadcast_object_list": "keepstep.train.ranks.operations",
    "check_device_map": "keepstep.models.device_map",
    "clean_device_map": "keepstep.models.device_map",
    "clear_device_cache": "keepstep.train.batch_size",
    "clear_environment": "keepstep.train.patching",
    "compare_versions": "keepstep.train.available",
    "compute_module_sizes": "keepstep.models.sizes",
    "concatenate": "keepstep.train.ranks.tensors",
    "convert_file_size_to_int": "keepstep.models.sizes",
    "convert_outputs_to_fp32": "keepstep.train.ranks.tensors",
    "convert_to_fp32": "keepstep.train.ranks.tensors",
    "extract_model_from_parallel": "keepstep.train.ranks.parallel",
    "extract_submodules_state_dict": "keepstep.models.offload",
    "find_batch_size": "keepstep.train.ranks.tensors",
    "find_device": "keepstep.train.ranks.tensors",
    "find_executable_batch_size": "keepstep.train.batch_size",
    "find_tied_parameters": "keepstep.models.naming",
    "gather": "keepstep.train.ranks.operations",
    "gather_object": "keepstep.train.ranks.operations",
    "get_balanced_memory": "keepstep.models.device_map",
    "get_data_structure": "keepstep.train.ranks.tensors",
    "get_int_from_env": "keepstep.train.patching",
    "get_max_layer_size": "keepstep.models.sizes",
    "get_max_memory": "keepstep.models.sizes",
    "honor_type": "keepstep.train.ranks.tensors",
    "ignorant_find_batch_size": "keepstep.train.ranks.tensors",
    "infer_auto_device_map": "keepstep.models.device_map",
    "initialize_tensors": "keepstep.train.ranks.tensors",
    "is_bf16_available": "keepstep.train.available",
    "is_comet_ml_available": "keepstep.train.available",
    "is_cuda_available": "keepstep.train.available",
    "is_datasets_available": "keepstep.train.available",
    "is_deepspeed_available": "keepstep.train.available",
    "is_fp16_available": "keepstep.train.available",
    "is_matplotlib_available": "keepstep.train.available",
    "is_mlflow_available": "keepstep.train.available",
    "is_mps_available": "keepstep.train.available",
    "is_namedtuple": "keepstep.train.ranks.tensors",
    "is_npu_available": "keepstep.train.available",
    "is_pandas_available": "keepstep.train.available",
    "is_peft_available": "keepstep.train.available",
    "is_rich_available": "keepstep.train.available",
    "is_tensor_information": "keepstep.train.ranks.tensors",
    "is_tensorboard_available": "keepstep.train.available",
    "is_timm_available": "keepstep.train.available",
    "is_torch_tensor": "keepstep.train.ranks.tensors",
    "is_torch_version": "keepstep.train.available",
    "is_torch_xla_available": "keepstep.train.available",
    "is_torchdata_available": "keepstep.train.available",
    "is_torchvision_available": "keepstep.train.available",
    "is_transformers_available": "keepstep.train.available",
    "is_wandb_available": "keepstep.train.available",
    "is_xpu_available": "keepstep.train.available",
    "listify": "keepstep.train.ranks.tensors",
    "load": "keepstep.models.objects",
    "load_checkpoint_in_model": "keepstep.models.loading",
    "named_module_tensors": "keepstep.models.naming",
    "offload_state_dict": "keepstep.models.offload",
    "pad_across_processes": "keepstep.train.ranks.operations",
    "parse_choice_from_env": "keepstep.train.patching",
    "parse_flag_from_env": "keepstep.train.patching",
    "patch_environment": "keepstep.train.patching",
    "recursively_apply": "keepstep.train.ranks.tensors",
    "reduce": "keepstep.train.ranks.operations",
    "release_memory": "keepstep.train.batch_size",
    "retie_parameters": "keepstep.models.naming",
    "send_to_device": "keepstep.train.placement",
    "set_module_tensor_to_device": "keepstep.models.naming",
    "set_seed": "keepstep.train.ranks.seeding",
    "should_reduce_batch_size": "keepstep.train.batch_size",
    "slice_tensors": "keepstep.train.ranks.tensors",
    "str_to_bool": "keepstep.train.patching",
    "synchronize_rng_state": "keepstep.train.ranks.seeding",
    "synchronize_rng_states": "keepstep.train.ranks.seeding",
    "tqdm": "keepstep.track.bars",
    "wait_for_everyone": "keepstep.train.ranks.operations",
    "write_basic_config": "keepstep.launch.basic",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF_NAME.get(name)
    if home is None:
        raise AttributeError(
            f"module 'keepstep.utils' has no attribute {name!r}; it has: {', '.join(__all__)}"
        )
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
