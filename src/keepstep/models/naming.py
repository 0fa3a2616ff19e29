"""Tensors of a module by name: which there are, which are tied, and how one is replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from keepstep.errors import UsageError
from keepstep.tree import DTYPES

__all__ = [
    "Device",
    "dtype_of",
    "find_tied_parameters",
    "is_meta",
    "module_at",
    "named_module_tensors",
    "non_persistent_buffers",
    "placed_on",
    "retie_parameters",
    "set_module_tensor_to_device",
    "tensor_at",
]

Device = int | str | torch.device
"""A device as a device map names it; "disk" is one of them."""


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name ("float16", "torch.float16"); a dtype and None stay what they are.

    Raises:
        UsageError: there is no dtype of that name.
    """
    if not isinstance(dtype, str):
        return dtype
    found = DTYPES.get(dtype.removeprefix("torch."))
    if found is None:
        raise UsageError(f'dtype is {dtype!r}; expected a torch dtype or its name, such as "bfloat16"')
    return found


def is_meta(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no values."""
    return tensor.device.type == "meta"


def module_at(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and the tensor's name in it.

    Raises:
        UsageError: there is no tensor of that name.
    """
    path, _, last = name.rpartition(".")
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        raise UsageError(f"{type(model).__name__} has no module {path!r}, so no tensor {name!r}") from None
    if last not in holder._parameters and last not in holder._buffers:
        raise UsageError(
            f"{type(holder).__name__} at {path or 'the root'!r} has no parameter or buffer named {last!r}"
        )
    return holder, last


def tensor_at(model: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its full name."""
    holder, last = module_at(model, name)
    tensor: torch.Tensor = getattr(holder, last)
    return tensor


def non_persistent_buffers(module: nn.Module, *, recurse: bool = False) -> set[str]:
    """Names of buffers that a state dict leaves out."""
    if not recurse:
        return set(module._non_persistent_buffers_set)
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }


def named_module_tensors(
    module: nn.Module,
    include_buffers: bool = True,
    recurse: bool = False,
    remove_non_persistent: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module, each with its name.

    Args:
        module: whose tensors.
        include_buffers: False for parameters only.
        recurse: those of modules inside it too.
        remove_non_persistent: leave out buffers that a state dict leaves out.
    """
    yield from module.named_parameters(recurse=recurse)
    if include_buffers:
        left_out = non_persistent_buffers(module, recurse=recurse) if remove_non_persistent else set()
        yield from (item for item in module.named_buffers(recurse=recurse) if item[0] not in left_out)


# ------------------------------------------------------------------------------------------- ties


def find_tied_parameters(model: nn.Module, **_: Any) -> list[list[str]]:
    """Groups of names under which a model holds one and the same parameter, each group sorted."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied_params: Sequence[Sequence[str]]) -> None:
    """Make names share one parameter again, where replacing tensors one by one has parted them.

    The first of a group that has values is taken; names whose parameter lies on another device keep theirs.

    Args:
        model: changed in place.
        tied_params: from `find_tied_parameters`.
    """
    for group in tied_params:
        held = [(name, tensor_at(model, name)) for name in group]
        first = next((tensor for _, tensor in held if not is_meta(tensor)), None)
        if first is None:
            continue
        for name, tensor in held:
            if tensor is not first and (is_meta(tensor) or tensor.device == first.device):
                holder, last = module_at(model, name)
                holder._parameters[last] = first  # type: ignore[assignment]


# ---------------------------------------------------------------------------------------- replace


def placed_on(device_map: Mapping[str, Device], name: str) -> Device | None:
    """Where a device map puts a tensor or module: the entry of the nearest module around it; None if none."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def set_module_tensor_to_device(
    module: nn.Module,
    tensor_name: str,
    device: Device,
    value: torch.Tensor | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Replace a parameter or buffer by one on another device.

    Args:
        module: changed in place.
        tensor_name: its full name.
        device: where it goes; "meta" drops its values.
        value: what it becomes, cast to the tensor's dtype unless `dtype` is given; None moves what is there.
        dtype: what values become that are not whole numbers; None keeps the tensor's own.

    Raises:
        UsageError: there is no such tensor, it has no values to move, or the value has another shape.
    """
    holder, last = module_at(module, tensor_name)
    old: torch.Tensor = getattr(holder, last)
    target, wanted = torch.device(device), dtype_of(dtype)
    if value is None:
        if is_meta(old) and target.type != "meta":
            raise UsageError(
                f"{tensor_name} is on the meta device and has no values to put on {target}; pass value"
            )
        value = old
    elif old.shape != value.shape:
        raise UsageError(
            f"{tensor_name} has the shape {list(old.shape)}, and the value for it {list(value.shape)}"
        )
    floating = value.is_floating_point() or value.is_complex()
    kept = wanted if wanted is not None and floating else (value.dtype if wanted is not None else old.dtype)
    _put(holder, last, value.detach().to(device=target, dtype=kept), old)


def _put(holder: nn.Module, name: str, new: torch.Tensor, old: torch.Tensor) -> None:
    if name in holder._buffers:
        holder._buffers[name] = new
        return
    there = new.data_ptr() == old.data_ptr() and new.device == old.device and new.dtype == old.dtype
    if there and not is_meta(new):
        return  # whoever holds the parameter keeps it
    kind: Any = type(old)
    parameter = kind(new, requires_grad=old.requires_grad)
    parameter.__dict__.update(old.__dict__)
    holder._parameters[name] = parameter
