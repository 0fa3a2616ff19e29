"""Hooks that bring a module's weights and inputs to the device where it runs, and its weights away again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from keepstep.errors import UsageError
from keepstep.models.hooks import (
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    hook_of,
    remove_hook_from_module,
)
from keepstep.models.moving import send_to_device
from keepstep.models.naming import (
    Device,
    is_meta,
    named_module_tensors,
    set_module_tensor_to_device,
    tensor_at,
)

__all__ = [
    "AlignDevicesHook",
    "CpuOffload",
    "PartOfWeights",
    "UserCpuOffloadHook",
    "align_module_device",
    "attach_offload",
    "has_offloaded_params",
    "offloaded_state",
]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


class AlignDevicesHook(ModelHook):
    """Runs a module on one device; its weights, if they are offloaded, are there for as long as it runs.

    Args:
        execution_device: where inputs and weights are when the module runs; None leaves them.
        offload: keep weights in `weights_map` and on the meta device between two runs.
        io_same_device: bring the output to where the first tensor of the input was.
        weights_map: offloaded weights by name in the module; None keeps those that it has, on the CPU.
        offload_buffers: buffers are offloaded too.
        place_submodules: weights of the modules in it too, not just its own.
        skip_keys: keyword arguments that are not moved.
    """

    def __init__(
        self,
        execution_device: Device | None = None,
        offload: bool = False,
        io_same_device: bool = False,
        weights_map: Mapping[str, torch.Tensor] | None = None,
        offload_buffers: bool = False,
        place_submodules: bool = False,
        skip_keys: str | Sequence[str] | None = None,
    ) -> None:
        self.execution_device = None if execution_device is None else torch.device(execution_device)
        self.offload = offload
        self.io_same_device = io_same_device
        self.weights_map = weights_map
        self.offload_buffers = offload_buffers
        self.place_submodules = place_submodules
        self.skip_keys = [skip_keys] if isinstance(skip_keys, str) else list(skip_keys or ())
        self.original_devices: dict[str, torch.device] = {}
        self._input_devices: list[torch.device | None] = []

    def __repr__(self) -> str:
        return f"AlignDevicesHook(execution_device={self.execution_device}, offload={self.offload})"

    def offloaded_names(self, module: nn.Module) -> list[str]:
        """Names of the module's tensors that wait elsewhere."""
        if not self.offload:
            return []
        found = named_module_tensors(
            module, self.offload_buffers, recurse=self.place_submodules, remove_non_persistent=True
        )
        return [name for name, _ in found]

    def init_hook(self, module: nn.Module) -> nn.Module:
        tensors = dict(named_module_tensors(module, recurse=self.place_submodules))
        offloaded = self.offloaded_names(module)
        self.original_devices = {name: tensors[name].device for name in offloaded}
        if self.offload and self.weights_map is None:
            self.weights_map = {name: tensors[name].detach().to("cpu") for name in offloaded}
        for name in offloaded:
            if self.weights_map is not None and name not in self.weights_map:
                raise UsageError(
                    f"{name!r} of a {type(module).__name__} is to be offloaded, but is not among the "
                    "offloaded weights. Offload the model again, into an empty folder"
                )
            set_module_tensor_to_device(module, name, "meta")
        if self.execution_device is not None:
            for name in tensors.keys() - set(offloaded):
                if not is_meta(tensors[name]):
                    set_module_tensor_to_device(module, name, self.execution_device)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        first = next(_tensors([args, kwargs]), None) if self.io_same_device else None
        self._input_devices.append(None if first is None else first.device)
        if len(self._input_devices) == 1:
            self._bring(module)
        if self.execution_device is None:
            return args, kwargs
        return (
            send_to_device(args, self.execution_device, skip_keys=self.skip_keys),
            send_to_device(kwargs, self.execution_device, skip_keys=self.skip_keys),
        )

    def _bring(self, module: nn.Module) -> None:
        assert self.weights_map is not None or not self.offload
        for name in self.offloaded_names(module):
            value = self.weights_map[name]  # type: ignore[index]
            set_module_tensor_to_device(module, name, self.execution_device or value.device, value)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        device = self._input_devices[-1]
        self.failed(module)
        return output if device is None else send_to_device(output, device, skip_keys=self.skip_keys)

    def failed(self, module: nn.Module) -> None:
        """Let go of the weights, unless the module runs inside itself."""
        self._input_devices.pop()
        if not self._input_devices:
            for name in self.offloaded_names(module):
                set_module_tensor_to_device(module, name, "meta")

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for name, device in self.original_devices.items():
            if device.type != "meta" and self.weights_map is not None:
                set_module_tensor_to_device(module, name, device, self.weights_map[name])
        return module


class PartOfWeights(Mapping[str, torch.Tensor]):
    """The weights below a name."""

    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: str) -> None:
        self._weights = weights
        self._prefix = f"{prefix}." if prefix else ""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._weights[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        cut = len(self._prefix)
        return (name[cut:] for name in self._weights if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def attach_offload(
    model: nn.Module,
    execution_device: Device,
    weights_map: Mapping[str, torch.Tensor],
    *,
    module_name: str = "",
    offload_buffers: bool = False,
    preload_module_classes: Sequence[str] | None = None,
    skip_keys: str | Sequence[str] | None = None,
) -> None:
    """Offload each module in a model that has tensors of its own.

    Args:
        model: changed in place.
        execution_device: where modules run.
        weights_map: the weights, by full name.
        module_name: of `model` in the names of `weights_map`.
        offload_buffers: buffers too.
        preload_module_classes: classes whose modules get the weights of all modules in them at once, as they
            use them without calling those.
        skip_keys: keyword arguments that are not moved.
    """
    at_once = type(model).__name__ in (preload_module_classes or ())
    if at_once or any(True for _ in named_module_tensors(model)):
        hook = AlignDevicesHook(
            execution_device,
            offload=True,
            weights_map=PartOfWeights(weights_map, module_name),
            offload_buffers=offload_buffers,
            place_submodules=at_once,
            skip_keys=skip_keys,
        )
        add_hook_to_module(model, hook, append=True)
    if at_once:
        return
    for name, child in model.named_children():
        attach_offload(
            child,
            execution_device,
            weights_map,
            module_name=f"{module_name}.{name}" if module_name else name,
            offload_buffers=offload_buffers,
            preload_module_classes=preload_module_classes,
            skip_keys=skip_keys,
        )


def offloaded_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The values of what is offloaded, by full name, wherever they wait."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        hook = hook_of(module)
        for part in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(part, AlignDevicesHook) and part.weights_map is not None:
                for name in part.offloaded_names(module):
                    if is_meta(tensor_at(module, name)):
                        found[f"{prefix}.{name}" if prefix else name] = part.weights_map[name]
    return found


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = hook_of(module)
    for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def has_offloaded_params(module: nn.Module) -> bool:
    """Whether a module's own weights wait elsewhere between two forwards."""
    return _offloading_hook(module) is not None


@contextlib.contextmanager
def align_module_device(module: nn.Module, execution_device: Device | None = None) -> Iterator[None]:
    """A context in which a module's own parameters are where they are computed with.

    Offloaded ones are brought, and gone again afterwards, with what was written to them. Others are moved
    there and back, and keep it.

    Args:
        module: those of the modules in it stay where they are.
        execution_device: where to; None for that of the module's hook, or for where they are.
    """
    hook = _offloading_hook(module)
    if hook is not None:
        usual = hook.execution_device
        hook.execution_device = usual if execution_device is None else torch.device(execution_device)
        try:
            hook.pre_forward(module)
            try:
                yield
            finally:
                hook.failed(module)
        finally:
            hook.execution_device = usual
        return
    parameters = [] if execution_device is None else list(module.parameters(recurse=False))
    before = [parameter.device for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.to(execution_device)
        yield
    finally:
        for parameter, device in zip(parameters, before, strict=True):
            parameter.data = parameter.data.to(device)


class CpuOffload(ModelHook):
    """Brings a whole model to a device before it runs, where it stays until it is offloaded.

    Args:
        execution_device: where it runs; None for the accelerator, if there is one.
        prev_module_hook: the handle of another model, which is offloaded first.
    """

    def __init__(
        self,
        execution_device: Device | None = None,
        prev_module_hook: UserCpuOffloadHook | None = None,
    ) -> None:
        current = torch.accelerator.current_accelerator(check_available=True)
        default = current if current is not None else torch.device("cpu")
        self.execution_device = default if execution_device is None else torch.device(execution_device)
        self.prev_module_hook = prev_module_hook

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.to("cpu")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        module.to(self.execution_device)
        return send_to_device(args, self.execution_device), send_to_device(kwargs, self.execution_device)


class UserCpuOffloadHook:
    """The handle of `cpu_offload_with_hook`.

    Args:
        model: what is offloaded.
        hook: its hook.
    """

    def __init__(self, model: nn.Module, hook: CpuOffload) -> None:
        self.model = model
        self.hook = hook

    def offload(self) -> None:
        """Put the model back onto the CPU."""
        self.hook.init_hook(self.model)

    def remove(self) -> None:
        """Take the hook away; the model stays where it is."""
        remove_hook_from_module(self.model)
