"""Objects that ranks send each other: plain data and tensors, put as checkpoints write them, no pickle."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch

from keepstep.dense import flat_bytes
from keepstep.errors import UnsupportedTypeError
from keepstep.tree import DTYPES, flatten, unflatten

__all__ = ["from_bytes", "to_bytes"]

_LENGTH = struct.Struct("<Q")


def to_bytes(value: Any) -> bytes:
    """An object as bytes: anything that a checkpoint may hold, in any nesting.

    Raises:
        UnsupportedTypeError: a type that is not plain data and has no codec; names its place.
        StateError: as for a checkpoint, for what contains itself and tensors without plain bytes.
    """
    flat = flatten(value)
    tensors, parts = [], []
    for leaf in flat.leaves:
        if leaf.shard is not None:
            raise UnsupportedTypeError(
                f"{leaf.address!r} is a sharded tensor, and other ranks could do nothing with a part of it; "
                "send tensor.full_tensor()"
            )
        dense = leaf.tensor.cpu().contiguous()
        tensors.append([leaf.address, str(dense.dtype).removeprefix("torch."), list(dense.shape)])
        parts.append(flat_bytes(dense).numpy().tobytes() if dense.numel() else b"")
    head = json.dumps({"tree": flat.tree, "tensors": tensors}).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *parts])


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given; tensors come back on the CPU, in memory of their own."""
    (length,) = _LENGTH.unpack_from(data)
    begin = _LENGTH.size + length
    head = json.loads(data[_LENGTH.size : begin])
    tensors = {}
    for address, dtype_name, shape in head["tensors"]:
        tensor = torch.empty(shape, dtype=DTYPES[dtype_name])
        if tensor.numel():
            received = torch.frombuffer(bytearray(data[begin : begin + tensor.nbytes]), dtype=tensor.dtype)
            tensor = received.reshape(shape)
        tensors[address] = tensor
        begin += tensor.nbytes
    return unflatten(head["tree"], tensors.__getitem__)
