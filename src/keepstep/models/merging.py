"""Shards that ranks wrote become one model that others load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from keepstep.checkpoint.convert.dcp_files import is_dcp, read_dcp_model
from keepstep.models.export import check_export, export_weights
from keepstep.models.weights import read_weights

__all__ = ["merge_weights"]

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
