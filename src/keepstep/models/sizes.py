"""How much memory a model and its modules take, and how much there is."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from keepstep.control_groups import free_memory_bytes
from keepstep.errors import UsageError
from keepstep.models.naming import dtype_of, named_module_tensors

__all__ = [
    "Memory",
    "compute_module_sizes",
    "convert_file_size_to_int",
    "dtype_byte_size",
    "get_max_layer_size",
    "get_max_memory",
    "max_memory_in_bytes",
]

_log = logging.getLogger(__name__)

Memory: TypeAlias = dict[int | str, int]
"""Bytes by device: numbers for accelerators, then "mps", "cpu" and "disk"."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT])(I?B)\s*", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def convert_file_size_to_int(size: int | str) -> int:
    """A size in bytes: a number, or a text as "500MB", "1.5GB" (powers of 1000), "1GiB" (powers of 1024).

    A small "b", as in "8Gb", means bits.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise UsageError(
            f'{size!r} is no size; expected whole bytes, or a text with a unit, such as "500MB" or "1GiB"'
        )
    number, prefix, unit = found.groups()
    count = int(float(number) * (1024 if len(unit) == 2 else 1000) ** _POWERS[prefix.upper()])
    return count // 8 if unit == "b" else count


def compute_module_sizes(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    buffers_only: bool = False,
) -> dict[str, int]:
    """Bytes of each tensor and module of a model, by name; "" is the whole. Tied parameters count once.

    Args:
        model: may be on the meta device.
        dtype: what floating point values are going to be converted to, where that is smaller.
        special_dtypes: what some tensors are going to be, by name, whatever `dtype` says.
        buffers_only: leave parameters out.
    """
    wanted = dtype_of(dtype)
    special = {name: dtype_of(kind) for name, kind in (special_dtypes or {}).items()}
    tensors = model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True)
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in tensors:
        size = tensor.numel() * _itemsize(tensor.dtype, wanted, special.get(name))
        parts = name.split(".")
        for end in range(len(parts) + 1):
            sizes[".".join(parts[:end])] += size
    return sizes


def dtype_byte_size(dtype: torch.dtype) -> int:
    """Bytes that one element takes."""
    return dtype.itemsize


def _itemsize(dtype: torch.dtype, wanted: torch.dtype | None, special: torch.dtype | None) -> int:
    if special is not None:
        return special.itemsize
    if wanted is None or not (dtype.is_floating_point or dtype.is_complex):
        return dtype.itemsize
    return min(wanted.itemsize, dtype.itemsize)


def get_max_layer_size(
    modules: Iterable[tuple[str, Any]],
    module_sizes: Mapping[str, int],
    no_split_module_classes: Sequence[str],
) -> tuple[int, list[str]]:
    """The size of the largest layer, bytes, and the names of all layers of that size.

    A layer is a module without children, one whose class is not to be split, or a tensor.
    """
    largest, names = 0, list[str]()
    waiting = list(modules)[::-1]
    while waiting:
        name, module = waiting.pop()
        children = list(module.named_children()) if isinstance(module, nn.Module) else []
        if children and type(module).__name__ not in no_split_module_classes:
            waiting += [(f"{name}.{child}", part) for child, part in reversed(children)]
            continue
        size = module_sizes[name]
        if size > largest:
            largest, names = size, [name]
        elif size == largest:
            names.append(name)
    return largest, names


def get_max_memory(max_memory: Mapping[int | str, int | str] | None = None) -> Memory:
    """How many bytes a model may take on each device, accelerators first, then "mps", "cpu" and "disk".

    Args:
        max_memory: by device; sizes as numbers or texts. None measures what is free now.

    Raises:
        UsageError: a size or a device is none.
    """
    if max_memory is None:
        return _free_memory()
    given = max_memory_in_bytes(max_memory)
    unknown = [key for key in given if not isinstance(key, int) and key not in _NAMED]
    if unknown:
        raise UsageError(
            f"max_memory names the device {unknown[0]!r}; allowed: the numbers of accelerators, "
            + ", ".join(map(repr, _NAMED))
        )
    numbers = sorted(key for key in given if isinstance(key, int))
    there = torch.accelerator.device_count()
    absent = [number for number in numbers if not 0 <= number < there]
    if absent:
        _log.warning("max_memory names the devices %s; this machine has %d accelerators", absent, there)
    ordered: list[int | str] = [*numbers, *(name for name in _NAMED if name in given)]
    return {key: given[key] for key in ordered}


def max_memory_in_bytes(max_memory: Mapping[int | str, int | str]) -> Memory:
    """The same devices, each with its size in bytes."""
    return {device: convert_file_size_to_int(size) for device, size in max_memory.items()}


_NAMED = ("mps", "cpu", "disk")


def _free_memory() -> Memory:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    host = _free_on_host()
    if accelerator is None:
        return {"cpu": host}
    if accelerator.type == "mps":  # it shares the host's memory
        return {"mps": host}
    module = torch.get_device_module(accelerator)
    free: Memory = {number: module.mem_get_info(number)[0] for number in range(module.device_count())}
    shared = accelerator.type == "cuda" and any(
        getattr(module.get_device_properties(number), "is_integrated", False) for number in free
    )
    return free if shared else {**free, "cpu": host}


def _free_on_host() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system than Linux
        return free_memory_bytes()
    return min(free, free_memory_bytes())
