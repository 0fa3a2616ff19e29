"""How much memory a model takes, from the shapes of its weights alone; imports no torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

from keepstep.errors import CheckpointNotFoundError, DamagedCheckpointError, UsageError

__all__ = ["DTYPES", "Estimate", "count_elements", "estimate"]

DTYPES: Final = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4}
"""Names and bits of a number."""

_ADAM_BYTES: Final = 4 + 4 + 8
"""Weights, gradients and Adam's two averages, in float32, bytes a parameter."""
_CAST_BYTES: Final = 2
"""Mixed precision's copies of the weights during a forward, bytes a parameter."""
_MOST_HEADER_BYTES: Final = 100_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of a model in one dtype, in bytes; activations are not in it.

    Attributes:
        dtype: of the weights.
        largest_layer: of the layer that is largest, which must fit a device at least.
        total: of all weights.
        training: weights, gradients and Adam's averages; float16 and bfloat16 are mixed precision, where
            these stay in float32; None for dtypes in which nobody trains.
    """

    dtype: str
    largest_layer: int
    total: int
    training: int | None


def estimate(elements: Mapping[str, int], dtype: str) -> Estimate:
    """Memory of a model in a dtype.

    Args:
        elements: numbers in each tensor, by its name in the state dict.
        dtype: one of `DTYPES`.

    Raises:
        UsageError: a dtype that is none of them.
    """
    if dtype not in DTYPES:
        raise UsageError(f"the dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    layers: dict[str, int] = {}
    for name, count in elements.items():
        layers[_layer_of(name)] = layers.get(_layer_of(name), 0) + count
    total = sum(elements.values())
    per_parameter = {"float32": _ADAM_BYTES, "float16": _ADAM_BYTES + _CAST_BYTES}
    per_parameter["bfloat16"] = per_parameter["float16"]
    return Estimate(
        dtype=dtype,
        largest_layer=max(layers.values(), default=0) * DTYPES[dtype] // 8,
        total=total * DTYPES[dtype] // 8,
        training=total * per_parameter[dtype] if dtype in per_parameter else None,
    )


def _layer_of(name: str) -> str:
    """`h.0` for `h.0.attn.weight`: a numbered block, else the module that has the tensor."""
    block = re.match(r"(?:[^.]*[^.0-9][^.]*\.)*?\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def count_elements(path: Path) -> dict[str, int]:
    """Numbers in each tensor of a model, by name.

    Args:
        path: a `.safetensors` file, a directory with such files, or a `config.json` (or a directory with one)
            of transformers'; files come before a configuration, and only it needs transformers.

    Raises:
        CheckpointNotFoundError: there is nothing of the kind.
        DamagedCheckpointError: a file is no safetensors file.
        UsageError: transformers is needed and missing, or knows no such model.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files = [file for file in files if file.suffix == ".safetensors" and file.is_file()]
    if files:
        counts: dict[str, int] = {}
        for file in files:
            counts |= _in_file(file)
        return counts
    config = path / "config.json" if path.is_dir() else path
    if config.name != "config.json" or not config.is_file():
        raise CheckpointNotFoundError(
            f"{path} is no model: expected a .safetensors file, or a directory with such files or a "
            "config.json. Nothing is downloaded."
        )
    try:
        described = import_module("keepstep.models.described")
    except ImportError as error:
        raise UsageError(
            f"{config} is read with transformers, which is not installed ({error}). Install it, or give "
            "safetensors files, which need nothing: pip install transformers"
        ) from None
    from_config: dict[str, int] = described.count_from_config(config)
    return from_config


def _in_file(path: Path) -> dict[str, int]:
    """Reads the header alone."""
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else _MOST_HEADER_BYTES + 1
        text = file.read(size) if size <= _MOST_HEADER_BYTES else b""
    try:
        header = json.loads(text)
        return {name: math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(path, f"it is no whole safetensors file ({error})") from None
