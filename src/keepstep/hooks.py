"""Names that scripts import from `accelerate.hooks`."""

from __future__ import annotations

from keepstep.models.align import AlignDevicesHook, CpuOffload, UserCpuOffloadHook
from keepstep.models.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
    remove_hook_from_submodules,
)

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "ModelHook",
    "SequentialHook",
    "UserCpuOffloadHook",
    "add_hook_to_module",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]
