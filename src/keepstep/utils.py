"""Names that scripts import from `accelerate.utils`, each from where it lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepstep.lazy import lazy_names

if TYPE_CHECKING:
    from keepstep.launch.basic import write_basic_config as write_basic_config
    from keepstep.models.align import align_module_device as align_module_device
    from keepstep.models.align import has_offloaded_params as has_offloaded_params
    from keepstep.models.device_map import check_device_map as check_device_map
    from keepstep.models.device_map import clean_device_map as clean_device_map
    from keepstep.models.device_map import get_balanced_memory as get_balanced_memory
    from keepstep.models.device_map import infer_auto_device_map as infer_auto_device_map
    from keepstep.models.loading import load_checkpoint_in_model as load_checkpoint_in_model
    from keepstep.models.merging import merge_fsdp_weights as merge_fsdp_weights
    from keepstep.models.moving import send_to_device as send_to_device
    from keepstep.models.names import MODEL_NAME as MODEL_NAME
    from keepstep.models.names import OPTIMIZER_NAME as OPTIMIZER_NAME
    from keepstep.models.names import PROFILE_PATTERN_NAME as PROFILE_PATTERN_NAME
    from keepstep.models.names import RNG_STATE_NAME as RNG_STATE_NAME
    from keepstep.models.names import SAFE_MODEL_NAME as SAFE_MODEL_NAME
    from keepstep.models.names import SAFE_WEIGHTS_INDEX_NAME as SAFE_WEIGHTS_INDEX_NAME
    from keepstep.models.names import SAFE_WEIGHTS_NAME as SAFE_WEIGHTS_NAME
    from keepstep.models.names import SAFE_WEIGHTS_PATTERN_NAME as SAFE_WEIGHTS_PATTERN_NAME
    from keepstep.models.names import SAMPLER_NAME as SAMPLER_NAME
    from keepstep.models.names import SCALER_NAME as SCALER_NAME
    from keepstep.models.names import SCHEDULER_NAME as SCHEDULER_NAME
    from keepstep.models.names import WEIGHTS_INDEX_NAME as WEIGHTS_INDEX_NAME
    from keepstep.models.names import WEIGHTS_NAME as WEIGHTS_NAME
    from keepstep.models.names import WEIGHTS_PATTERN_NAME as WEIGHTS_PATTERN_NAME
    from keepstep.models.naming import find_tied_parameters as find_tied_parameters
    from keepstep.models.naming import named_module_tensors as named_module_tensors
    from keepstep.models.naming import retie_parameters as retie_parameters
    from keepstep.models.naming import set_module_tensor_to_device as set_module_tensor_to_device
    from keepstep.models.objects import load as load
    from keepstep.models.offload import OffloadedWeightsLoader as OffloadedWeightsLoader
    from keepstep.models.offload import extract_submodules_state_dict as extract_submodules_state_dict
    from keepstep.models.offload import load_offloaded_weights as load_offloaded_weights
    from keepstep.models.offload import offload_state_dict as offload_state_dict
    from keepstep.models.offload import offload_weight as offload_weight
    from keepstep.models.offload import save_offload_index as save_offload_index
    from keepstep.models.sizes import compute_module_sizes as compute_module_sizes
    from keepstep.models.sizes import convert_file_size_to_int as convert_file_size_to_int
    from keepstep.models.sizes import dtype_byte_size as dtype_byte_size
    from keepstep.models.sizes import get_max_layer_size as get_max_layer_size
    from keepstep.models.sizes import get_max_memory as get_max_memory
    from keepstep.models.weights import load_state_dict as load_state_dict
    from keepstep.patching import clear_environment as clear_environment
    from keepstep.patching import get_int_from_env as get_int_from_env
    from keepstep.patching import parse_choice_from_env as parse_choice_from_env
    from keepstep.patching import parse_flag_from_env as parse_flag_from_env
    from keepstep.patching import patch_environment as patch_environment
    from keepstep.patching import str_to_bool as str_to_bool
    from keepstep.track.bars import tqdm as tqdm
    from keepstep.track.registry import LoggerType as LoggerType
    from keepstep.train.available import compare_versions as compare_versions
    from keepstep.train.available import is_4bit_bnb_available as is_4bit_bnb_available
    from keepstep.train.available import is_8bit_bnb_available as is_8bit_bnb_available
    from keepstep.train.available import is_aim_available as is_aim_available
    from keepstep.train.available import is_bf16_available as is_bf16_available
    from keepstep.train.available import is_bnb_available as is_bnb_available
    from keepstep.train.available import is_boto3_available as is_boto3_available
    from keepstep.train.available import is_clearml_available as is_clearml_available
    from keepstep.train.available import is_comet_ml_available as is_comet_ml_available
    from keepstep.train.available import is_cuda_available as is_cuda_available
    from keepstep.train.available import is_datasets_available as is_datasets_available
    from keepstep.train.available import is_deepspeed_available as is_deepspeed_available
    from keepstep.train.available import is_dvclive_available as is_dvclive_available
    from keepstep.train.available import is_fp8_available as is_fp8_available
    from keepstep.train.available import is_fp16_available as is_fp16_available
    from keepstep.train.available import is_hpu_available as is_hpu_available
    from keepstep.train.available import is_lomo_available as is_lomo_available
    from keepstep.train.available import is_matplotlib_available as is_matplotlib_available
    from keepstep.train.available import is_megatron_lm_available as is_megatron_lm_available
    from keepstep.train.available import is_mlflow_available as is_mlflow_available
    from keepstep.train.available import is_mlu_available as is_mlu_available
    from keepstep.train.available import is_mps_available as is_mps_available
    from keepstep.train.available import is_msamp_available as is_msamp_available
    from keepstep.train.available import is_musa_available as is_musa_available
    from keepstep.train.available import is_npu_available as is_npu_available
    from keepstep.train.available import is_pandas_available as is_pandas_available
    from keepstep.train.available import is_peft_available as is_peft_available
    from keepstep.train.available import is_pynvml_available as is_pynvml_available
    from keepstep.train.available import is_pytest_available as is_pytest_available
    from keepstep.train.available import is_rich_available as is_rich_available
    from keepstep.train.available import is_rocm_available as is_rocm_available
    from keepstep.train.available import is_sagemaker_available as is_sagemaker_available
    from keepstep.train.available import is_schedulefree_available as is_schedulefree_available
    from keepstep.train.available import is_sdaa_available as is_sdaa_available
    from keepstep.train.available import is_swanlab_available as is_swanlab_available
    from keepstep.train.available import is_tensorboard_available as is_tensorboard_available
    from keepstep.train.available import is_timm_available as is_timm_available
    from keepstep.train.available import is_torch_version as is_torch_version
    from keepstep.train.available import is_torch_xla_available as is_torch_xla_available
    from keepstep.train.available import is_torchao_available as is_torchao_available
    from keepstep.train.available import is_torchdata_available as is_torchdata_available
    from keepstep.train.available import (
        is_torchdata_stateful_dataloader_available as is_torchdata_stateful_dataloader_available,
    )
    from keepstep.train.available import is_torchvision_available as is_torchvision_available
    from keepstep.train.available import is_trackio_available as is_trackio_available
    from keepstep.train.available import is_transformer_engine_available as is_transformer_engine_available
    from keepstep.train.available import is_transformers_available as is_transformers_available
    from keepstep.train.available import is_triton_available as is_triton_available
    from keepstep.train.available import is_wandb_available as is_wandb_available
    from keepstep.train.available import is_weights_only_available as is_weights_only_available
    from keepstep.train.available import is_xpu_available as is_xpu_available
    from keepstep.train.batch_size import clear_device_cache as clear_device_cache
    from keepstep.train.batch_size import find_executable_batch_size as find_executable_batch_size
    from keepstep.train.batch_size import release_memory as release_memory
    from keepstep.train.batch_size import should_reduce_batch_size as should_reduce_batch_size
    from keepstep.train.ranks.operations import broadcast as broadcast
    from keepstep.train.ranks.operations import broadcast_object_list as broadcast_object_list
    from keepstep.train.ranks.operations import gather as gather
    from keepstep.train.ranks.operations import gather_object as gather_object
    from keepstep.train.ranks.operations import pad_across_processes as pad_across_processes
    from keepstep.train.ranks.operations import reduce as reduce
    from keepstep.train.ranks.operations import save as save
    from keepstep.train.ranks.operations import wait_for_everyone as wait_for_everyone
    from keepstep.train.ranks.parallel import extract_model_from_parallel as extract_model_from_parallel
    from keepstep.train.ranks.parallel import is_compiled_module as is_compiled_module
    from keepstep.train.ranks.parallel import is_peft_model as is_peft_model
    from keepstep.train.ranks.process import DistributedType as DistributedType
    from keepstep.train.ranks.seeding import set_seed as set_seed
    from keepstep.train.ranks.seeding import synchronize_rng_state as synchronize_rng_state
    from keepstep.train.ranks.seeding import synchronize_rng_states as synchronize_rng_states
    from keepstep.train.ranks.tensors import TensorInformation as TensorInformation
    from keepstep.train.ranks.tensors import concatenate as concatenate
    from keepstep.train.ranks.tensors import convert_outputs_to_fp32 as convert_outputs_to_fp32
    from keepstep.train.ranks.tensors import convert_to_fp32 as convert_to_fp32
    from keepstep.train.ranks.tensors import find_batch_size as find_batch_size
    from keepstep.train.ranks.tensors import find_device as find_device
    from keepstep.train.ranks.tensors import get_data_structure as get_data_structure
    from keepstep.train.ranks.tensors import honor_type as honor_type
    from keepstep.train.ranks.tensors import ignorant_find_batch_size as ignorant_find_batch_size
    from keepstep.train.ranks.tensors import initialize_tensors as initialize_tensors
    from keepstep.train.ranks.tensors import is_namedtuple as is_namedtuple
    from keepstep.train.ranks.tensors import is_tensor_information as is_tensor_information
    from keepstep.train.ranks.tensors import is_torch_tensor as is_torch_tensor
    from keepstep.train.ranks.tensors import listify as listify
    from keepstep.train.ranks.tensors import merge_dicts as merge_dicts
    from keepstep.train.ranks.tensors import recursively_apply as recursively_apply
    from keepstep.train.ranks.tensors import slice_tensors as slice_tensors
    from keepstep.train.settings.config import DataLoaderConfiguration as DataLoaderConfiguration
    from keepstep.train.settings.config import GradientAccumulationPlugin as GradientAccumulationPlugin
    from keepstep.train.settings.config import GradScalerKwargs as GradScalerKwargs
    from keepstep.train.settings.config import ProjectConfiguration as ProjectConfiguration
    from keepstep.train.settings.kwargs import KwargsHandler as KwargsHandler
    from keepstep.train.settings.plugins import AutocastKwargs as AutocastKwargs
    from keepstep.train.settings.plugins import DDPCommunicationHookType as DDPCommunicationHookType
    from keepstep.train.settings.plugins import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from keepstep.train.settings.plugins import DynamoBackend as DynamoBackend
    from keepstep.train.settings.plugins import (
        FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin,
    )
    from keepstep.train.settings.plugins import InitProcessGroupKwargs as InitProcessGroupKwargs
    from keepstep.train.settings.plugins import PrecisionType as PrecisionType
    from keepstep.train.settings.plugins import ProfileKwargs as ProfileKwargs
    from keepstep.train.settings.plugins import RNGType as RNGType
    from keepstep.train.settings.plugins import TorchDynamoPlugin as TorchDynamoPlugin

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
    "KwargsHandler": "keepstep.train.settings.kwargs",
    "LoggerType": "keepstep.track.registry",
    "MODEL_NAME": "keepstep.models.names",
    "OPTIMIZER_NAME": "keepstep.models.names",
    "OffloadedWeightsLoader": "keepstep.models.offload",
    "PROFILE_PATTERN_NAME": "keepstep.models.names",
    "PrecisionType": "keepstep.train.settings.plugins",
    "ProfileKwargs": "keepstep.train.settings.plugins",
    "ProjectConfiguration": "keepstep.train.settings.config",
    "RNGType": "keepstep.train.settings.plugins",
    "RNG_STATE_NAME": "keepstep.models.names",
    "SAFE_MODEL_NAME": "keepstep.models.names",
    "SAFE_WEIGHTS_INDEX_NAME": "keepstep.models.names",
    "SAFE_WEIGHTS_NAME": "keepstep.models.names",
    "SAFE_WEIGHTS_PATTERN_NAME": "keepstep.models.names",
    "SAMPLER_NAME": "keepstep.models.names",
    "SCALER_NAME": "keepstep.models.names",
    "SCHEDULER_NAME": "keepstep.models.names",
    "TensorInformation": "keepstep.train.ranks.tensors",
    "TorchDynamoPlugin": "keepstep.train.settings.plugins",
    "WEIGHTS_INDEX_NAME": "keepstep.models.names",
    "WEIGHTS_NAME": "keepstep.models.names",
    "WEIGHTS_PATTERN_NAME": "keepstep.models.names",
    "align_module_device": "keepstep.models.align",
    "broadcast": "keepstep.train.ranks.operations",
    "broadcast_object_list": "keepstep.train.ranks.operations",
    "check_device_map": "keepstep.models.device_map",
    "clean_device_map": "keepstep.models.device_map",
    "clear_device_cache": "keepstep.train.batch_size",
    "clear_environment": "keepstep.patching",
    "compare_versions": "keepstep.train.available",
    "compute_module_sizes": "keepstep.models.sizes",
    "concatenate": "keepstep.train.ranks.tensors",
    "convert_file_size_to_int": "keepstep.models.sizes",
    "convert_outputs_to_fp32": "keepstep.train.ranks.tensors",
    "convert_to_fp32": "keepstep.train.ranks.tensors",
    "dtype_byte_size": "keepstep.models.sizes",
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
    "get_int_from_env": "keepstep.patching",
    "get_max_layer_size": "keepstep.models.sizes",
    "get_max_memory": "keepstep.models.sizes",
    "has_offloaded_params": "keepstep.models.align",
    "honor_type": "keepstep.train.ranks.tensors",
    "ignorant_find_batch_size": "keepstep.train.ranks.tensors",
    "infer_auto_device_map": "keepstep.models.device_map",
    "initialize_tensors": "keepstep.train.ranks.tensors",
    "is_4bit_bnb_available": "keepstep.train.available",
    "is_8bit_bnb_available": "keepstep.train.available",
    "is_aim_available": "keepstep.train.available",
    "is_bf16_available": "keepstep.train.available",
    "is_bnb_available": "keepstep.train.available",
    "is_boto3_available": "keepstep.train.available",
    "is_clearml_available": "keepstep.train.available",
    "is_comet_ml_available": "keepstep.train.available",
    "is_compiled_module": "keepstep.train.ranks.parallel",
    "is_cuda_available": "keepstep.train.available",
    "is_datasets_available": "keepstep.train.available",
    "is_deepspeed_available": "keepstep.train.available",
    "is_dvclive_available": "keepstep.train.available",
    "is_fp16_available": "keepstep.train.available",
    "is_fp8_available": "keepstep.train.available",
    "is_hpu_available": "keepstep.train.available",
    "is_lomo_available": "keepstep.train.available",
    "is_matplotlib_available": "keepstep.train.available",
    "is_megatron_lm_available": "keepstep.train.available",
    "is_mlflow_available": "keepstep.train.available",
    "is_mlu_available": "keepstep.train.available",
    "is_mps_available": "keepstep.train.available",
    "is_msamp_available": "keepstep.train.available",
    "is_musa_available": "keepstep.train.available",
    "is_namedtuple": "keepstep.train.ranks.tensors",
    "is_npu_available": "keepstep.train.available",
    "is_pandas_available": "keepstep.train.available",
    "is_peft_available": "keepstep.train.available",
    "is_peft_model": "keepstep.train.ranks.parallel",
    "is_pynvml_available": "keepstep.train.available",
    "is_pytest_available": "keepstep.train.available",
    "is_rich_available": "keepstep.train.available",
    "is_rocm_available": "keepstep.train.available",
    "is_sagemaker_available": "keepstep.train.available",
    "is_schedulefree_available": "keepstep.train.available",
    "is_sdaa_available": "keepstep.train.available",
    "is_swanlab_available": "keepstep.train.available",
    "is_tensor_information": "keepstep.train.ranks.tensors",
    "is_tensorboard_available": "keepstep.train.available",
    "is_timm_available": "keepstep.train.available",
    "is_torch_tensor": "keepstep.train.ranks.tensors",
    "is_torch_version": "keepstep.train.available",
    "is_torch_xla_available": "keepstep.train.available",
    "is_torchao_available": "keepstep.train.available",
    "is_torchdata_available": "keepstep.train.available",
    "is_torchdata_stateful_dataloader_available": "keepstep.train.available",
    "is_torchvision_available": "keepstep.train.available",
    "is_trackio_available": "keepstep.train.available",
    "is_transformer_engine_available": "keepstep.train.available",
    "is_transformers_available": "keepstep.train.available",
    "is_triton_available": "keepstep.train.available",
    "is_wandb_available": "keepstep.train.available",
    "is_weights_only_available": "keepstep.train.available",
    "is_xpu_available": "keepstep.train.available",
    "listify": "keepstep.train.ranks.tensors",
    "load": "keepstep.models.objects",
    "load_checkpoint_in_model": "keepstep.models.loading",
    "load_offloaded_weights": "keepstep.models.offload",
    "load_state_dict": "keepstep.models.weights",
    "merge_dicts": "keepstep.train.ranks.tensors",
    "merge_fsdp_weights": "keepstep.models.merging",
    "named_module_tensors": "keepstep.models.naming",
    "offload_state_dict": "keepstep.models.offload",
    "offload_weight": "keepstep.models.offload",
    "pad_across_processes": "keepstep.train.ranks.operations",
    "parse_choice_from_env": "keepstep.patching",
    "parse_flag_from_env": "keepstep.patching",
    "patch_environment": "keepstep.patching",
    "recursively_apply": "keepstep.train.ranks.tensors",
    "reduce": "keepstep.train.ranks.operations",
    "release_memory": "keepstep.train.batch_size",
    "retie_parameters": "keepstep.models.naming",
    "save": "keepstep.train.ranks.operations",
    "save_offload_index": "keepstep.models.offload",
    "send_to_device": "keepstep.models.moving",
    "set_module_tensor_to_device": "keepstep.models.naming",
    "set_seed": "keepstep.train.ranks.seeding",
    "should_reduce_batch_size": "keepstep.train.batch_size",
    "slice_tensors": "keepstep.train.ranks.tensors",
    "str_to_bool": "keepstep.patching",
    "synchronize_rng_state": "keepstep.train.ranks.seeding",
    "synchronize_rng_states": "keepstep.train.ranks.seeding",
    "tqdm": "keepstep.track.bars",
    "wait_for_everyone": "keepstep.train.ranks.operations",
    "write_basic_config": "keepstep.launch.basic",
}

__all__ = sorted(_HOME_OF_NAME)  # noqa: PLE0605
__getattr__, __dir__ = lazy_names(__name__, _HOME_OF_NAME)
