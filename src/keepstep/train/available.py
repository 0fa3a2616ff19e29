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
    "is_bf16_available",
    "is_comet_ml_available",
    "is_cuda_available",
    "is_datasets_available",
    "is_deepspeed_available",
    "is_fp16_available",
    "is_matplotlib_available",
    "is_mlflow_available",
    "is_mps_available",
    "is_npu_available",
    "is_pandas_available",
    "is_peft_available",
    "is_rich_available",
    "is_tensorboard_available",
    "is_timm_available",
    "is_torch_version",
    "is_torch_xla_available",
    "is_torchdata_available",
    "is_torchvision_available",
    "is_transformers_available",
    "is_wandb_available",
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


is_comet_ml_available = _installed("comet_ml")
is_datasets_available = _installed("datasets")
is_deepspeed_available = _installed("deepspeed")
is_matplotlib_available = _installed("matplotlib")
is_mlflow_available = _installed("mlflow")
is_pandas_available = _installed("pandas")
is_peft_available = _installed("peft")
is_rich_available = _installed("rich")
is_timm_available = _installed("timm")
is_torchdata_available = _installed("torchdata")
is_torchvision_available = _installed("torchvision")
is_transformers_available = _installed("transformers")
is_wandb_available = _installed("wandb")


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
