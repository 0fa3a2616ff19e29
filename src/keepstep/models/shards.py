"""Which tensor goes into which file of an export, and which need not be written at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from keepstep.errors import TensorNotSavableError

__all__ = ["FORMAT_KEY", "apart_from_aliases", "dense", "shard_names", "split"]

FORMAT_KEY = "format"
"""The key of a safetensors file's metadata that says how its tensors lie; no alias can have this name."""


def split(sizes: Sequence[tuple[str, int]], limit_bytes: int) -> list[list[str]]:
    """Cut tensors, in order, into shards of at most `limit_bytes`; a larger tensor gets one of its own.

    Args:
        sizes: names and bytes.
        limit_bytes: of a shard.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """File names of an export of `count` shards."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def apart_from_aliases(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and names that stand for one of them: the same view of the same memory.

    Raises:
        TensorNotSavableError: a value is no tensor, or has no plain bytes.
    """
    kept: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        _refuse(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first and name != FORMAT_KEY:
            aliases[name] = first[place]
        else:
            first[place] = name
            kept[name] = tensor
    return kept, aliases


def _refuse(name: str, tensor: object) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TensorNotSavableError(
            f"{name!r} is a {type(tensor).__name__}, and a weights file holds tensors only. Leave it out of "
            "the state dict, or keep it in a checkpoint (save_state)"
        )
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.is_quantized:
        what = "on the meta device" if tensor.device.type == "meta" else "sparse or quantized"
        raise TensorNotSavableError(
            f"{name!r} is {what} and has no plain bytes to write. Load its values or make it dense first"
        )


def dense(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the host, each with memory of its own if others of them lie in the same."""
    sharing: dict[int, int] = defaultdict(int)
    copied = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for tensor in copied.values():
        sharing[tensor.untyped_storage().data_ptr()] += 1
    return {
        name: tensor.clone() if sharing[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in copied.items()
    }
