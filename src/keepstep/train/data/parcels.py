"""Batches as bytes, to hand them from one rank to another; never pickle.

Containers and plain values travel as the typed JSON of `keepstep.tree`, tensors as their bytes. Named tuples
and mappings of a class of their own travel by that class's name, which the receiver has to know already; any
other class can be taught with `register_codec`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from keepstep.errors import KeepstepError, UsageError
from keepstep.tree import DTYPES, flatten, has_codec, type_name, unflatten

__all__ = ["digest", "pack", "packed_text", "unpack", "unpacked_text"]

_ALIGNMENT = 16
_KIND, _ITEMS = "\0class", "\0items"


def pack(value: Any) -> tuple[bytes, torch.Tensor]:
    """Take a nested value apart.

    Returns:
        What it is, as JSON; and the bytes of its tensors, a uint8 tensor of one dimension.

    Raises:
        UsageError: it holds a class that the receiver could not find.
        UnsupportedTypeError, TensorNotSavableError: it holds something that has no plain bytes.
    """
    flat = flatten({"batch": _named(value)})
    table: dict[str, tuple[str, list[int], int]] = {}
    end = 0
    for leaf in flat.leaves:
        table[leaf.address] = (
            str(leaf.tensor.dtype).removeprefix("torch."),
            list(leaf.tensor.shape),
            end,
        )
        end += -(-leaf.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    data = torch.zeros(end, dtype=torch.uint8)
    for leaf in flat.leaves:
        at = table[leaf.address][2]
        _piece(data, at, leaf.tensor.nbytes, leaf.tensor.dtype).copy_(leaf.tensor.reshape(-1))
    return json.dumps([flat.tree, table]).encode(), data


def unpack(text: bytes, data: torch.Tensor) -> Any:
    """Rebuild what `pack` took apart; its tensors lie in the memory of `data`."""
    tree, table = json.loads(text)

    def tensor_at(address: str) -> torch.Tensor:
        name, shape, at = table[address]
        dtype = DTYPES[name]
        elements = 1
        for length in shape:
            elements *= length
        return _piece(data, at, elements * dtype.itemsize, dtype).reshape(shape)

    return _unnamed(unflatten(tree, tensor_at)["batch"])


def digest(value: Any) -> str:
    """Tell nested values apart; of those that can't be packed, only by their class."""
    try:
        text, data = pack(value)
    except KeepstepError:
        return type_name(type(value))
    found = hashlib.blake2b(text, digest_size=16)
    found.update(data.numpy().tobytes())
    return found.hexdigest()


def packed_text(value: Any) -> str:
    """A nested value as one text, tensors included: for states that are small."""
    text, data = pack(value)
    return json.dumps([text.decode(), base64.b64encode(data.numpy().tobytes()).decode()])


def unpacked_text(text: str) -> Any:
    """Rebuild what `packed_text` made."""
    tree, encoded = json.loads(text)
    data = np.frombuffer(bytearray(base64.b64decode(encoded)), dtype=np.uint8)
    return unpack(tree.encode(), torch.from_numpy(data))


def _piece(data: torch.Tensor, at: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return data[at : at + size].view(dtype)


def _named(value: Any) -> Any:
    """Write the class's name beside what `flatten` would refuse."""
    kind = type(value)
    if has_codec(value) or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {_KIND: _address(kind), _ITEMS: [_named(item) for item in value]}
    if isinstance(value, Mapping):
        items = {key: _named(item) for key, item in value.items()}
        if kind is dict:
            return items
        if kind.__module__ in ("builtins", "collections"):
            return value
        return {_KIND: _address(kind), _ITEMS: items}
    if kind is list or kind is tuple:
        return kind(_named(item) for item in value)
    return value


def _unnamed(value: Any) -> Any:
    if isinstance(value, dict):
        if _KIND in value:
            items = _unnamed(value[_ITEMS])
            kind = _find(value[_KIND])
            return kind(*items) if isinstance(items, list) else kind(items)
        if type(value) is dict:
            return {key: _unnamed(item) for key, item in value.items()}
        return value
    if isinstance(value, list | tuple):
        return type(value)(_unnamed(item) for item in value)
    return value


def _address(kind: type) -> str:
    address = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = _find(address)
    except (KeyError, AttributeError):
        found = None
    if found is not kind:
        raise UsageError(
            f"A batch holds a {type_name(kind)}, which another process can't find by that name, so it can't "
            "be sent there. Define the class at the top level of a module, collate to dicts, lists and "
            "tuples, or use dispatch_batches=False."
        )
    return address


def _find(address: str) -> Any:
    module, _, name = address.partition(":")
    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found
