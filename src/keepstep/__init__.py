"""keepstep: train PyTorch models so that progress is never lost.

Public names are imported on first use, so `import keepstep` costs milliseconds and looking at
checkpoints never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from keepstep.lazy import lazy_names

if TYPE_CHECKING:
    from keepstep.checkpoint import dcp as dcp
    from keepstep.checkpoint.engine import save_directory as save_directory
    from keepstep.checkpoint.keeping.retention import Retention as Retention
    from keepstep.checkpoint.pending import PendingSave as PendingSave
    from keepstep.checkpoint.store import Store as Store
    from keepstep.checkpoint.version import Checkpoint as Checkpoint
    from keepstep.launch.notebook import debug_launcher as debug_launcher
    from keepstep.launch.notebook import notebook_launcher as notebook_launcher
    from keepstep.models.device_map import infer_auto_device_map as infer_auto_device_map
    from keepstep.models.dispatch import cpu_offload as cpu_offload
    from keepstep.models.dispatch import cpu_offload_with_hook as cpu_offload_with_hook
    from keepstep.models.dispatch import disk_offload as disk_offload
    from keepstep.models.dispatch import dispatch_model as dispatch_model
    from keepstep.models.dispatch import load_checkpoint_and_dispatch as load_checkpoint_and_dispatch
    from keepstep.models.empty import init_empty_weights as init_empty_weights
    from keepstep.models.empty import init_on_device as init_on_device
    from keepstep.models.loading import load_checkpoint_in_model as load_checkpoint_in_model
    from keepstep.models.objects import load as load
    from keepstep.train.accelerator import Accelerator as Accelerator
    from keepstep.train.available import is_rich_available as is_rich_available
    from keepstep.train.batch_size import find_executable_batch_size as find_executable_batch_size
    from keepstep.train.data.loader import skip_first_batches as skip_first_batches
    from keepstep.train.ranks.process import DistributedType as DistributedType
    from keepstep.train.ranks.process import PartialState as PartialState
    from keepstep.train.ranks.seeding import synchronize_rng_states as synchronize_rng_states
    from keepstep.train.settings.config import CheckpointPolicy as CheckpointPolicy
    from keepstep.train.settings.config import DataLoaderConfiguration as DataLoaderConfiguration
    from keepstep.train.settings.config import GradScalerKwargs as GradScalerKwargs
    from keepstep.train.settings.config import ProjectConfiguration as ProjectConfiguration
    from keepstep.train.settings.plugins import AutocastKwargs as AutocastKwargs
    from keepstep.train.settings.plugins import DDPCommunicationHookType as DDPCommunicationHookType
    from keepstep.train.settings.plugins import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from keepstep.train.settings.plugins import (
        FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin,
    )
    from keepstep.train.settings.plugins import InitProcessGroupKwargs as InitProcessGroupKwargs
    from keepstep.train.settings.plugins import ProfileKwargs as ProfileKwargs
    from keepstep.tree import register_codec as register_codec

__version__ = "0.1.0"

_HOME_OF_NAME = {
    "Accelerator": "keepstep.train.accelerator",
    "AutocastKwargs": "keepstep.train.settings.plugins",
    "Checkpoint": "keepstep.checkpoint.version",
    "CheckpointPolicy": "keepstep.train.settings.config",
    "DDPCommunicationHookType": "keepstep.train.settings.plugins",
    "DataLoaderConfiguration": "keepstep.train.settings.config",
    "DistributedDataParallelKwargs": "keepstep.train.settings.plugins",
    "DistributedType": "keepstep.train.ranks.process",
    "FullyShardedDataParallelPlugin": "keepstep.train.settings.plugins",
    "GradScalerKwargs": "keepstep.train.settings.config",
    "InitProcessGroupKwargs": "keepstep.train.settings.plugins",
    "PartialState": "keepstep.train.ranks.process",
    "PendingSave": "keepstep.checkpoint.pending",
    "ProfileKwargs": "keepstep.train.settings.plugins",
    "ProjectConfiguration": "keepstep.train.settings.config",
    "Retention": "keepstep.checkpoint.keeping.retention",
    "Store": "keepstep.checkpoint.store",
    "cpu_offload": "keepstep.models.dispatch",
    "cpu_offload_with_hook": "keepstep.models.dispatch",
    "debug_launcher": "keepstep.launch.notebook",
    "disk_offload": "keepstep.models.dispatch",
    "dispatch_model": "keepstep.models.dispatch",
    "find_executable_batch_size": "keepstep.train.batch_size",
    "infer_auto_device_map": "keepstep.models.device_map",
    "init_empty_weights": "keepstep.models.empty",
    "init_on_device": "keepstep.models.empty",
    "is_rich_available": "keepstep.train.available",
    "load": "keepstep.models.objects",
    "load_checkpoint_and_dispatch": "keepstep.models.dispatch",
    "load_checkpoint_in_model": "keepstep.models.loading",
    "notebook_launcher": "keepstep.launch.notebook",
    "register_codec": "keepstep.tree",
    "save_directory": "keepstep.checkpoint.engine",
    "skip_first_batches": "keepstep.train.data.loader",
    "synchronize_rng_states": "keepstep.train.ranks.seeding",
}

__all__ = ["__version__", "dcp", *sorted(_HOME_OF_NAME)]  # noqa: PLE0604
__getattr__, __dir__ = lazy_names(__name__, _HOME_OF_NAME, modules=["keepstep.checkpoint.dcp"])
