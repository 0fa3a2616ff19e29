"""What this process could use: packages that are installed, devices that are there."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion

from keepstep.errors import UsageError

__all__ = [
    "compare_versions",
    "is_4bit_bnb_available",
    "is_8bit_bnb_available",
    "is_aim_available",
    "is_bf16_available",
    "is_bnb_available",
    "is_boto3_available",
    "is_clearml_available",
    "is_comet_ml_available",
    "is_cuda_available",
    "is_datasets_available",
    "is_deepspeed_available",
    "is_dvclive_available",
    "is_fp8_available",
    "is_fp16_available",
    "is_hpu_available",
    "is_lomo_available",
    "is_matplotlib_available",
    "is_megatron_lm_available",
    "is_mlflow_available",
    "is_mlu_available",
    "is_mps_available",
    "is_msamp_available",
    "is_musa_available",
    "is_npu_available",
    "is_pandas_available",
    "is_peft_available",
    "is_pynvml_available",
    "is_pytest_available",
    "is_rich_available",
    "is_rocm_available",
    "is_sagemaker_available",
    "is_schedulefree_available",
    "is_sdaa_available",
    "is_swanlab_available",
    "is_tensorboard_available",
    "is_timm_available",
    "is_torch_version",
    "is_torch_xla_available",
    "is_torchao_available",
    "is_torchdata_available",
    "is_torchdata_stateful_dataloader_available",
    "is_torchvision_available",
    "is_trackio_available",
    "is_transformer_engine_available",
    "is_transformers_available",
    "is_triton_available",
    "is_wandb_available",
    "is_weights_only_available",
    "is_xpu_available",
]

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


def _installed(package: str) -> Callable[[], bool]:
    def is_available() -> bool:
        return importlib.util.find_spec(package) is not None

    is_available.__doc__ = f"Whether the package {package} is installed."
    return is_available


is_aim_available = _installed("aim")
is_bnb_available = _installed("bitsandbytes")
is_boto3_available = _installed("boto3")
is_clearml_available = _installed("clearml")
is_comet_ml_available = _installed("comet_ml")
is_datasets_available = _installed("datasets")
is_deepspeed_available = _installed("deepspeed")
is_dvclive_available = _installed("dvclive")
is_lomo_available = _installed("lomo_optim")
is_matplotlib_available = _installed("matplotlib")
is_megatron_lm_available = _installed("megatron")
is_mlflow_available = _installed("mlflow")
is_msamp_available = _installed("msamp")
is_pandas_available = _installed("pandas")
is_peft_available = _installed("peft")
is_pynvml_available = _installed("pynvml")
is_pytest_available = _installed("pytest")
is_rich_available = _installed("rich")
is_sagemaker_available = _installed("sagemaker")
is_schedulefree_available = _installed("schedulefree")
is_swanlab_available = _installed("swanlab")
is_timm_available = _installed("timm")
is_torchao_available = _installed("torchao")
is_torchdata_available = _installed("torchdata")
is_torchvision_available = _installed("torchvision")
is_trackio_available = _installed("trackio")
is_transformer_engine_available = _installed("transformer_engine")
is_transformers_available = _installed("transformers")
is_triton_available = _installed("triton")
is_wandb_available = _installed("wandb")
is_4bit_bnb_available = is_8bit_bnb_available = is_bnb_available


def is_tensorboard_available() -> bool:
    """Whether tensorboard or tensorboardX is installed."""
    return any(importlib.util.find_spec(name) is not None for name in ("tensorboard", "tensorboardX"))


def _device_is_there(kind: str) -> bool:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == kind


def is_cuda_available() -> bool:
    """Whether there is a GPU of NVIDIA's or AMD's."""
    return _device_is_there("cuda")


def is_xpu_available(check_device: bool = False) -> bool:  # noqa: ARG001 (the device is always checked)
    """Whether there is a GPU of Intel's."""
    return _device_is_there("xpu")


def is_mps_available() -> bool:
    """Whether there is a GPU of Apple's."""
    return _device_is_there("mps")


def is_npu_available(check_device: bool = False) -> bool:  # noqa: ARG001
    """Whether there is an NPU of Huawei's."""
    return _device_is_there("npu")


def is_mlu_available(check_device: bool = False) -> bool:  # noqa: ARG001
    """Whether there is an MLU of Cambricon's."""
    return _device_is_there("mlu")


def is_musa_available(check_device: bool = False) -> bool:  # noqa: ARG001
    """Whether there is a GPU of Moore Threads'."""
    return _device_is_there("musa")


def is_sdaa_available(check_device: bool = False) -> bool:  # noqa: ARG001
    """Whether there is a device of Tecorigin's."""
    return _device_is_there("sdaa")


def is_hpu_available(init_hccl: bool = False) -> bool:  # noqa: ARG001
    """Whether there is a Gaudi of Intel's."""
    return _device_is_there("hpu")


def is_rocm_available() -> bool:
    """Whether there is a GPU of AMD's."""
    return torch.version.hip is not None and is_cuda_available()


def is_fp8_available() -> bool:
    """Whether a package for training in fp8 is installed; keepstep itself does not train in fp8."""
    return is_msamp_available() or is_transformer_engine_available() or is_torchao_available()


def is_torchdata_stateful_dataloader_available() -> bool:
    """Whether torchdata is installed, with its StatefulDataLoader."""
    return is_torchdata_available() and importlib.util.find_spec("torchdata.stateful_dataloader") is not None


def is_weights_only_available() -> bool:
    """True: every torch that keepstep runs with can load weights only."""
    return True


def is_torch_xla_available() -> bool:
    """False: keepstep does not run on XLA devices."""
    return False


def is_bf16_available(ignore_tpu: bool = False) -> bool:  # noqa: ARG001 (there is none)
    """Whether computing in bf16 works here."""
    return torch.cuda.is_bf16_supported() if is_cuda_available() else not is_mps_available()


def is_fp16_available() -> bool:
    """Whether computing in fp16 works here: on accelerators."""
    return torch.accelerator.is_available()


def compare_versions(version: str, operation: str, requirement: str) -> bool:
    """Compare two versions, as Python packages number them.

    Args:
        version: as "2.13.0+cpu".
        operation: one of ">", ">=", "==", "!=", "<=" and "<".
        requirement: as "2.10".

    Raises:
        UsageError: another operation.
    """
    if operation not in _OPERATIONS:
        raise UsageError(f"operation is {operation!r}; allowed: {', '.join(_OPERATIONS)}")
    return bool(_OPERATIONS[operation](TorchVersion(version), requirement))


def is_torch_version(operation: str, version: str) -> bool:
    """Compare the installed version of torch with another, as `is_torch_version(">=", "2.10")`."""
    return compare_versions(str(torch.__version__), operation, version)
