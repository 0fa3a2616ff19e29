"""Shards that ranks wrote become one model that others load."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from keepstep.checkpoint.convert.dcp_files import is_dcp, read_dcp_model
from keepstep.errors import UsageError
from keepstep.models.export import check_export, export_weights
from keepstep.models.weights import read_weights

__all__ = ["merge_fsdp_weights", "merge_weights"]

_FSDP_FOLDER: Final = "pytorch_model_fsdp_0"
"""Where Accelerate puts the first model's shards in a checkpoint."""


def merge_weights(
    checkpoint_dir: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "10GB",
) -> int:
    """Write the model of a checkpoint as safetensors files, whole, as transformers and others load it.

    Args:
        checkpoint_dir: a checkpoint of keepstep's, a directory of torch.distributed.checkpoint (as FSDP
            writes), an Accelerate checkpoint with such a directory in it, or files of weights.
        output_path: a directory; made if it is not there.
        max_shard_size: bytes of a file, or a text as "1GB".

    Returns:
        how many tensors were written.

    Raises:
        CheckpointNotFoundError, DamagedCheckpointError, ForeignTypeError: the checkpoint can't be read.
        UsageError, StoreError: it can't be written.
    """
    check_export(output_path, max_shard_size, True)
    source = Path(checkpoint_dir)
    if is_dcp(source / _FSDP_FOLDER):
        source /= _FSDP_FOLDER
    tensors = read_dcp_model(source) if is_dcp(source) else read_weights(source)
    export_weights(tensors, output_path, max_shard_size=max_shard_size)
    return len(tensors)


def merge_fsdp_weights(
    checkpoint_dir: str | os.PathLike[str],
    output_path: str | os.PathLike[str],
    safe_serialization: bool = True,
    remove_checkpoint_dir: bool = False,
) -> None:
    """`merge_weights` by Accelerate's name; call it in one process.

    Args:
        checkpoint_dir: see `merge_weights`.
        output_path: see `merge_weights`.
        safe_serialization: only True: the other format is pickle.
        remove_checkpoint_dir: delete the shards, once the model is written and durable.

    Raises:
        UsageError: pickle was asked for, or what was to be deleted holds what was written.
        CheckpointNotFoundError, DamagedCheckpointError, ForeignTypeError: the checkpoint can't be read.
        StoreError: the model can't be written; nothing was deleted.
    """
    check_export(output_path, "10GB", safe_serialization)
    source, target = Path(checkpoint_dir).resolve(), Path(output_path).resolve()
    if remove_checkpoint_dir and target.is_relative_to(source):
        raise UsageError(
            f"remove_checkpoint_dir=True would delete {output_path} with {checkpoint_dir}, in which it is. "
            "Give an output_path outside of it"
        )
    merge_weights(checkpoint_dir, output_path)
    if remove_checkpoint_dir:
        shutil.rmtree(source)
