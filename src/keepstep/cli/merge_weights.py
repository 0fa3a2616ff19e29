"""`keepstep merge-weights`: a checkpoint's model as safetensors files."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from keepstep.cli.phrasing import counted

__all__ = ["command"]


@click.command(
    name="merge-weights",
    short_help="Write the model of a checkpoint as safetensors files.",
    context_settings={"token_normalize_func": lambda name: name.replace("-", "_")},
    epilog="\b\nExit codes:\n  0  done\n  2  wrong usage, nothing found, or not readable",
)
@click.argument("checkpoint_dir", type=click.Path(path_type=Path))
@click.argument("output_path", type=click.Path(path_type=Path))
@click.option(
    "--max_shard_size", default="10GB", help="Size of a file at most: bytes, or as 1GB. Default: 10GB."
)
def command(checkpoint_dir: Path, output_path: Path, max_shard_size: str) -> None:
    """Write the model of a checkpoint as safetensors files.

    They hold it whole, in the names and layout that transformers and others load.

    CHECKPOINT_DIR is a checkpoint of keepstep's, a directory of torch.distributed.checkpoint (as FSDP
    writes), an Accelerate checkpoint with such a directory, or a directory of weights. It is left as it is.
    The whole model must fit in memory.
    """
    merge = import_module("keepstep.models.merging").merge_weights
    size = int(max_shard_size) if max_shard_size.isdecimal() else max_shard_size
    count: int = merge(checkpoint_dir, output_path, max_shard_size=size)
    click.echo(f"{counted(count, 'tensor')} written to {output_path}")
