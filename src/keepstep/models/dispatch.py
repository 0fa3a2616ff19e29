"""Models larger than one device, for inference: parts on several devices, on the CPU, on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from keepstep.errors import UsageError
from keepstep.models.align import (
    AlignDevicesHook,
    CpuOffload,
    PartOfWeights,
    UserCpuOffloadHook,
    attach_offload,
)
from keepstep.models.device_map import Kind, check_device_map, device_map_of_kind
from keepstep.models.hooks import add_hook_to_module
from keepstep.models.loading import load_checkpoint_in_model
from keepstep.models.naming import (
    Device,
    find_tied_parameters,
    is_meta,
    named_module_tensors,
    placed_on,
    retie_parameters,
)
from keepstep.models.offload import OffloadedWeightsLoader, OffloadFolder

__all__ = [
    "cpu_offload",
    "cpu_offload_with_hook",
    "disk_offload",
    "dispatch_model",
    "load_checkpoint_and_dispatch",
]


def cpu_offload(
    model: nn.Module,
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Keep a model's weights on the host, and bring those of each module to a device while it runs.

    Args:
        model: changed in place.
        execution_device: where it runs; None for where its first parameter is.
        offload_buffers: buffers are offloaded too.
        state_dict: its weights on the host; None takes those that it has.
        preload_module_classes: see `dispatch_model`.
    """
    device = _first_device(model) if execution_device is None else execution_device
    if state_dict is None:
        state_dict = {name: tensor.detach().to("cpu") for name, tensor in model.state_dict().items()}
    return _offloaded(model, device, state_dict, offload_buffers, preload_module_classes)


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Device | None = None,
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
) -> nn.Module:
    """Keep a model's weights in a folder, and bring those of each module to a device while it runs.

    Args:
        model: changed in place. Weights on the meta device have to be in the folder already.
        offload_dir: made if it is not there; other weights in it stay.
        execution_device: where it runs; None for where its first parameter is.
        offload_buffers: buffers are offloaded too.
        preload_module_classes: see `dispatch_model`.
    """
    device = _first_device(model) if execution_device is None else execution_device
    OffloadFolder(offload_dir).add(_with_values(model.state_dict()))
    weights = OffloadedWeightsLoader(save_folder=offload_dir)
    return _offloaded(model, device, weights, offload_buffers, preload_module_classes)


def _first_device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None or is_meta(first) else first.device


def _with_values(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not is_meta(tensor)}


def _offloaded(
    model: nn.Module,
    device: Device,
    weights: Mapping[str, torch.Tensor],
    offload_buffers: bool,
    preload_module_classes: Sequence[str] | None,
) -> nn.Module:
    _check_devices([device])
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
    attach_offload(
        model,
        device,
        weights,
        offload_buffers=offload_buffers,
        preload_module_classes=preload_module_classes,
    )
    return model


def cpu_offload_with_hook(
    model: nn.Module,
    execution_device: Device | None = None,
    prev_module_hook: UserCpuOffloadHook | None = None,
) -> tuple[nn.Module, UserCpuOffloadHook]:
    """Bring a whole model to a device when it runs first; it stays there until its handle says `offload()`.

    Args:
        model: changed in place; it goes to the CPU.
        execution_device: where it runs; None for the accelerator, if there is one.
        prev_module_hook: the handle of the model that runs before it, which is offloaded then.

    Returns:
        The model and its handle.
    """
    hook = CpuOffload(execution_device, prev_module_hook)
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)


# --------------------------------------------------------------------------------------- dispatch


@dataclass(frozen=True, kw_only=True)
class _Places:
    """Which module is where, and where it runs."""

    main: Device
    by_module: dict[str, Device]

    @property
    def offloaded(self) -> set[Device]:
        """The devices whose modules run elsewhere."""
        return {"disk"} if str(self.main) in ("cpu", "mps") else {"cpu", "disk"}

    def runs_on(self, device: Device) -> Device:
        """Where a module runs that is kept on a device."""
        return self.main if device in self.offloaded or device == "cpu" else device


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Device],
    main_device: Device | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Mapping[str, Any]] | None = None,
    offload_buffers: bool = False,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Spread a model over devices as a map says, with hooks that bring inputs and weights together.

    Args:
        model: changed in place.
        device_map: devices by name of module: accelerators, "cpu", "disk".
        main_device: where modules of the CPU and the disk run; None for the map's first accelerator, else
            the CPU.
        state_dict: weights of the modules on the CPU; None takes those that they have.
        offload_dir: where weights of modules on the disk are, or go if the model still has them.
        offload_index: where they are instead: `{name: {"safetensors_file": path, "weight_name": name}}`.
        offload_buffers: buffers are offloaded too.
        skip_keys: keyword arguments that are not moved between devices.
        preload_module_classes: names of classes whose modules get the weights of all modules in them at
            once, as they use them without calling those.
        force_hooks: hooks even if everything goes to one device.

    Raises:
        UsageError: the map leaves a tensor out, names a device that is not there, or the disk without a
            place for it.
    """
    check_device_map(model, device_map)
    _check_devices([*device_map.values(), *([] if main_device is None else [main_device])])
    devices = set(device_map.values())
    if len(devices) == 1 and "disk" not in devices and not force_hooks:
        (device,) = devices
        model.to(torch.device(device))
    else:
        ties = find_tied_parameters(model)
        places = _places(model, device_map, main_device)
        weights = _waiting_weights(model, places, state_dict, offload_dir, offload_index)
        _attach(model, "", places, weights, offload_buffers, skip_keys, preload_module_classes)
        held = model.named_parameters(remove_duplicate=False)
        here = {name for name, parameter in held if not is_meta(parameter)}
        retie_parameters(model, [[name for name in group if name in here] for group in ties])
        _guard(model)
    model.__dict__["hf_device_map"] = dict(device_map)
    return model


def _check_devices(devices: Sequence[Device]) -> None:
    there = torch.accelerator.device_count()
    for device in devices:
        number = device if isinstance(device, int) else None
        if number is None and device not in ("disk", "cpu", "meta"):
            found = torch.device(device)
            number = None if found.type in ("cpu", "meta") else found.index or 0
        if number is not None and not 0 <= number < there:
            raise UsageError(
                f"the device {device!r} is not there: this machine has {there} accelerators. Use their "
                'numbers, "cpu" or "disk"'
            )


def _places(model: nn.Module, device_map: Mapping[str, Device], main_device: Device | None) -> _Places:
    """Where each module is: with its own tensors, the furthest of which counts, or where the map puts it."""
    accelerators = [device for device in device_map.values() if device not in ("cpu", "disk")]
    main = main_device if main_device is not None else next(iter(accelerators), "cpu")
    by_module: dict[str, Device] = {}
    for name, module in model.named_modules():
        own = [placed_on(device_map, _below(name, tensor)) for tensor, _ in named_module_tensors(module)]
        held = [device for device in own or [placed_on(device_map, name)] if device is not None]
        if held:
            by_module[name] = next((device for device in ("disk", "cpu") if device in held), held[0])
    return _Places(main=main, by_module=by_module)


def _below(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _waiting_weights(
    model: nn.Module,
    places: _Places,
    state_dict: Mapping[str, torch.Tensor] | None,
    offload_dir: str | os.PathLike[str] | None,
    offload_index: Mapping[str, Mapping[str, Any]] | None,
) -> Mapping[str, torch.Tensor]:
    """The weights of offloaded modules by name; those of the disk are written if the model still has them."""
    state = model.state_dict()

    def held_on(device: str) -> dict[str, torch.Tensor]:
        names = (name for name in state if places.by_module.get(name.rpartition(".")[0]) == device)
        return {name: state[name].detach() for name in names}

    on_disk = held_on("disk")
    if on_disk and offload_dir is None and offload_index is None:
        some = ", ".join(list(on_disk)[:5])
        raise UsageError(f'the device_map puts {some} on the "disk"; pass offload_dir, where weights go')
    if on_disk and offload_dir is not None and offload_index is None:
        OffloadFolder(offload_dir).add(_with_values(on_disk))
    host = dict(state_dict or {})
    if state_dict is None and "cpu" in places.offloaded:
        host = {name: tensor.to("cpu") for name, tensor in _with_values(held_on("cpu")).items()}
    if not host and not on_disk:
        return {}
    return OffloadedWeightsLoader(host, offload_dir if on_disk else None, offload_index)


def _attach(
    module: nn.Module,
    name: str,
    places: _Places,
    weights: Mapping[str, torch.Tensor],
    offload_buffers: bool,
    skip_keys: str | Sequence[str] | None,
    preload_module_classes: Sequence[str] | None,
) -> None:
    """Give a module and all in it their hooks."""
    device = places.by_module.get(name)
    at_once = False
    if device is not None or name == "":
        offload = device in places.offloaded
        at_once = offload and type(module).__name__ in (preload_module_classes or ())
        hook = AlignDevicesHook(
            places.main if device is None else places.runs_on(device),
            offload=offload,
            io_same_device=name == "",
            weights_map=PartOfWeights(weights, name) if offload else None,
            offload_buffers=offload_buffers,
            place_submodules=at_once,
            skip_keys=skip_keys,
        )
        add_hook_to_module(module, hook)
    for child, part in () if at_once else module.named_children():
        _attach(
            part, _below(name, child), places, weights, offload_buffers, skip_keys, preload_module_classes
        )


def _guard(model: nn.Module) -> None:
    """A dispatched model stays where it is: its hooks would not know of the move."""
    for name in ("to", "cuda"):
        model.__dict__[name] = _Guarded(model, getattr(type(model), name))


class _Guarded:
    def __init__(self, model: nn.Module, method: Callable[..., Any]) -> None:
        self._model = model
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        moves = self._method.__name__ != "to" or torch._C._nn._parse_to(*args, **kwargs)[0] is not None
        if moves:
            raise UsageError(
                "this model is spread over devices by dispatch_model, and can't be moved as a whole. Take "
                "its hooks away first (remove_hook_from_submodules), or dispatch it with another device_map"
            )
        return self._method(self._model, *args, **kwargs)


# --------------------------------------------------------------------------------------- all at once


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: Mapping[str, Device] | Kind | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
) -> nn.Module:
    """Load weights into a model (an empty one, as a rule) and spread it over devices.

    Args:
        model: changed in place.
        checkpoint: see `load_checkpoint_in_model`.
        device_map: devices by name of module; "auto" and "balanced" use accelerators evenly,
            "balanced_low_0" leaves the first one as empty as possible, "sequential" fills one after the
            other. None only loads.
        max_memory: bytes (or texts) a device may take; None for what is free.
        no_split_module_classes: see `infer_auto_device_map`.
        offload_folder: where weights of modules on the disk go.
        offload_buffers: see `dispatch_model`.
        dtype: see `load_checkpoint_in_model`.
        offload_state_dict: see `load_checkpoint_in_model`.
        skip_keys: see `dispatch_model`.
        preload_module_classes: see `dispatch_model`.
        force_hooks: see `dispatch_model`.
        strict: see `load_checkpoint_in_model`.
        full_state_dict: see `load_checkpoint_in_model`.

    Raises:
        UsageError, MismatchError, CheckpointNotFoundError, DamagedCheckpointError: see there.
    """
    if isinstance(device_map, str):
        device_map = device_map_of_kind(
            device_map, model, max_memory, no_split_module_classes, dtype, offload_buffers=offload_buffers
        )
    load_checkpoint_in_model(
        model,
        checkpoint,
        device_map=device_map,
        offload_folder=offload_folder,
        dtype=dtype,
        offload_state_dict=bool(offload_state_dict),
        offload_buffers=offload_buffers,
        strict=strict,
        full_state_dict=full_state_dict,
    )
    if device_map is None:
        return model
    return dispatch_model(
        model,
        device_map,
        offload_dir=offload_folder,
        offload_buffers=offload_buffers,
        skip_keys=skip_keys,
        preload_module_classes=preload_module_classes,
        force_hooks=force_hooks,
    )
