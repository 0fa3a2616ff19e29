"""Which module goes to which device: a plan made from sizes alone, so the model may be an empty one.

Devices are filled in order: accelerators by number, then the CPU's memory, then the disk. The first
accelerator and the CPU keep room for the largest layer, since what lies further down is brought up there to
run. Tied parameters stay together.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from keepstep.errors import UsageError
from keepstep.models.naming import Device, find_tied_parameters, named_module_tensors, placed_on
from keepstep.models.sizes import compute_module_sizes, get_max_layer_size, get_max_memory

__all__ = [
    "Kind",
    "check_device_map",
    "clean_device_map",
    "device_map_of_kind",
    "get_balanced_memory",
    "infer_auto_device_map",
]

_log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""How a device map is made; see `load_checkpoint_and_dispatch`."""
_KINDS = get_args(Kind)

Named = tuple[str, Any]


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, int | str]:
    """Decide which module goes to which device, accelerators first, then the CPU, then the disk.

    Args:
        model: may be on the meta device.
        max_memory: bytes (or texts as "10GB") a device may take; None for what is free now.
        no_split_module_classes: names of classes whose modules stay in one piece, as those with a
            residual connection.
        dtype: what floating point values are going to be converted to.
        special_dtypes: other dtypes for some tensors, by name.
        verbose: log each decision at level INFO.
        clean_result: name a module instead of its parts where all of them go to one device.
        offload_buffers: buffers of what lies on the CPU or the disk lie there too.
        fallback_allocation: where a device would get nothing since the next module is too large for it,
            look for another one that fits.

    Returns:
        Devices by name of module or tensor.

    Raises:
        UsageError: a size or a device is none.
    """
    plan = _Plan(
        model,
        memory=get_max_memory(max_memory),
        whole=_class_names(no_split_module_classes),
        sizes=compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes),
        level=logging.INFO if verbose else logging.DEBUG,
        fallback=fallback_allocation,
    )
    device_map = plan.run()
    if not offload_buffers:
        _warn_of_buffers(model, device_map, plan)
    return clean_device_map(device_map) if clean_result else device_map


def _class_names(classes: str | Sequence[str] | None) -> list[str]:
    return [classes] if isinstance(classes, str) else list(classes or ())


def _parts(module: Any, prefix: str) -> list[Named]:
    """What a module falls apart into: its own parameters, its children, its own buffers."""
    parts = [
        *module.named_parameters(recurse=False),
        *module.named_children(),
        *module.named_buffers(recurse=False),
    ]
    return [(f"{prefix}.{name}" if prefix else name, part) for name, part in parts]


def _is_within(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


class _Plan:
    """Fills one device after the other.

    Attributes:
        waiting: modules and tensors that have no device yet, in the order of the model.
        used: bytes by device, room kept for the largest layer included once a device is full.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: Mapping[int | str, int],
        whole: Sequence[str],
        sizes: Mapping[str, int],
        level: int,
        fallback: bool,
    ) -> None:
        self.memory = memory
        self.sizes = sizes
        self.devices: list[int | str] = [*memory, *(() if "disk" in memory else ("disk",))]
        self.used = dict.fromkeys(self.devices, 0)
        self.waiting = _parts(model, "")
        self._whole = whole
        self._ties = find_tied_parameters(model)
        self._level = level
        self._fallback = fallback
        accelerators = [device for device in self.devices if device not in ("cpu", "disk")]
        if "mps" in accelerators:
            self._keep_room: list[int | str] = ["mps"]
        else:
            self._keep_room = [*accelerators[:1], "cpu"]
        self._measure_largest()

    @property
    def device(self) -> int | str:
        """The device that is being filled."""
        return self.devices[0]

    def _measure_largest(self) -> None:
        modules = [(name, module) for name, module in self.waiting if isinstance(module, nn.Module)]
        self._largest, self._largest_names = get_max_layer_size(modules, self.sizes, self._whole)

    def _room(self) -> int | None:
        """Bytes that may still be used here; None for the disk, which is never full."""
        if self.device == "disk":
            return None
        kept = self._largest if self.device in self._keep_room else 0
        return self.memory[self.device] - kept - self.used[self.device]

    def run(self) -> dict[str, int | str]:
        """The plan."""
        device_map: dict[str, int | str] = {}
        while self.waiting:
            name, module = self.waiting.pop(0)
            self._largest_names = [known for known in self._largest_names if not _is_within(known, name)]
            if not self._largest_names:
                self._measure_largest()
            partners = self._partners(name)
            size, room = self._size_with(name, partners), self._room()
            if room is None or size <= room:
                for placed in [name, *dict.fromkeys(holder for holder, _ in partners)]:
                    device_map[placed] = self.device
                self.used[self.device] += size
                self.waiting = [item for item in self.waiting if item[0] not in device_map]
                _log.log(self._level, "%s (%d bytes) goes to %s", name, size, self.device)
            elif not self._split(name, module, partners, room):
                self._next_device(name, module, size)
        return device_map

    def _partners(self, name: str) -> list[tuple[str, str]]:
        """What else has to go where a module goes: waiting modules, each with the tied parameter in it."""
        outside = [
            parameter
            for group in self._ties
            if any(_is_within(parameter, name) for parameter in group)
            for parameter in group
            if not _is_within(parameter, name)
        ]
        return [
            (holder, parameter)
            for parameter in outside
            for holder, _ in self.waiting
            if _is_within(parameter, holder)
        ]

    def _size_with(self, name: str, partners: Sequence[tuple[str, str]]) -> int:
        """Bytes of a module and its partners; a tied parameter is counted under one of its names."""
        return self.sizes[name] + sum(
            self.sizes.get(holder, 0) - self.sizes.get(parameter, 0) for holder, parameter in partners
        )

    def _children(self, name: str, module: Any) -> list[Named]:
        """The parts of a module that may be split; empty for any other."""
        splits = isinstance(module, nn.Module) and type(module).__name__ not in self._whole
        return _parts(module, name) if splits and any(True for _ in module.children()) else []

    def _split(self, name: str, module: Any, partners: Sequence[tuple[str, str]], room: int) -> bool:
        """Put parts in the place of what doesn't fit; False if nothing can be split."""
        if partners and self.sizes[name] <= room:  # the partners are too much: split one of them
            holders = {holder for holder, _ in partners}
            for place, (holder, held) in enumerate(self.waiting):
                parts = self._children(holder, held) if holder in holders else []
                if parts:
                    self.waiting = [(name, module), *self.waiting[:place], *parts, *self.waiting[place + 1 :]]
                    self._measure_largest()
                    return True
        parts = self._children(name, module) if self.sizes[name] >= room else []
        if not parts:
            return False
        _log.log(self._level, "%s does not fit on %s and is split", name, self.device)
        self.waiting = [*parts, *self.waiting]
        self._measure_largest()
        return True

    def _next_device(self, name: str, module: Any, size: int) -> None:
        """Leave a device, unless another module fits where none has been put yet."""
        device, kept = self.device, self._largest if self.device in self._keep_room else 0
        self.waiting.insert(0, (name, module))
        if self._fallback and not self.used[device]:
            fitting = self._fitting(self.memory[device] - max(self._largest, size))
            if fitting is not None:
                self._bring_to_front(fitting)
                return
        if not self.used[device]:
            _log.info("Nothing fits on %s: the next module needs %d bytes there", device, size + kept)
        self.used[device] += kept
        self.devices.pop(0)

    def _fitting(self, limit: int) -> str | None:
        """The first waiting module, or part of one, that takes at most `limit` bytes."""
        search = list(self.waiting)
        while search:
            name, module = search.pop(0)
            if self._size_with(name, self._partners(name)) <= limit:
                return name
            search[:0] = self._children(name, module)
        return None

    def _bring_to_front(self, name: str) -> None:
        """Make a module the next one; those around it are split."""
        while True:
            place = next(i for i, (known, _) in enumerate(self.waiting) if _is_within(name, known))
            known, module = self.waiting.pop(place)
            if known == name:
                self.waiting.insert(0, (known, module))
                return
            self.waiting[place:place] = _parts(module, known)


def _warn_of_buffers(model: nn.Module, device_map: Mapping[str, int | str], plan: _Plan) -> None:
    """Buffers of what is brought up to run stay on an accelerator all the time, unless they are offloaded."""
    accelerators = [device for device in plan.memory if device not in ("cpu", "disk")]
    if not accelerators:
        return
    needed = sum(
        buffer.numel() * buffer.itemsize
        for name, buffer in model.named_buffers()
        if placed_on(device_map, name) in ("cpu", "disk")
    )
    if needed and all(plan.memory[device] - plan.used.get(device, 0) < needed for device in accelerators):
        _log.warning(
            "The buffers of the offloaded modules take %d bytes, which fit on no accelerator beside what is "
            "there. Pass offload_buffers=True if it runs out of memory.",
            needed,
        )


def clean_device_map(device_map: dict[str, Any], module_name: str = "") -> dict[str, Any]:
    """Name a module instead of its parts where all of them go to one device; changes the map in place."""
    prefix = f"{module_name}." if module_name else ""
    within = [name for name in device_map if name.startswith(prefix)]
    devices = {device_map[name] for name in within}
    if len(devices) == 1 and len(within) > 1:
        (device,) = devices
        for name in within:
            del device_map[name]
        device_map[module_name] = device
        return device_map
    depth = len(prefix.split(".")) if prefix else 1
    for child in dict.fromkeys(".".join(name.split(".")[:depth]) for name in within):
        if child and child != module_name:
            clean_device_map(device_map, child)
    return device_map


def device_map_of_kind(
    kind: str,
    model: nn.Module,
    max_memory: Mapping[int | str, int | str] | None,
    no_split_module_classes: str | Sequence[str] | None,
    dtype: str | torch.dtype | None,
    *,
    offload_buffers: bool,
) -> dict[str, int | str]:
    """A device map as `load_checkpoint_and_dispatch` is asked for one.

    Raises:
        UsageError: there is no such kind.
    """
    if kind not in _KINDS:
        kinds = ", ".join(map(repr, _KINDS))
        raise UsageError(f"device_map is {kind!r}; allowed: {kinds}, or devices by name")
    if kind != "sequential":
        max_memory = get_balanced_memory(
            model, max_memory, no_split_module_classes, dtype, low_zero=kind == "balanced_low_0"
        )
    return infer_auto_device_map(
        model, max_memory, no_split_module_classes, dtype, offload_buffers=offload_buffers
    )


def check_device_map(model: nn.Module, device_map: Mapping[str, Device]) -> None:
    """See that a device map gives each tensor of a model a device.

    Raises:
        UsageError: naming the tensors that have none.
    """
    tensors = named_module_tensors(model, recurse=True)
    known = {name for name, _ in itertools.chain(model.named_modules(), tensors)} | set(model.state_dict())
    unknown = [name for name in device_map if name and name not in known]
    if unknown:
        _log.warning("The device_map names modules that are not there: %s", ", ".join(unknown))
    bare = [name for name in model.state_dict() if placed_on(device_map, name) is None]
    if bare:
        shown = ", ".join(bare[:10]) + (f" and {len(bare) - 10} more" if len(bare) > 10 else "")
        raise UsageError(
            f'the device_map gives no device to {shown}; add these, or "" for all that is left out'
        )


# -------------------------------------------------------------------------------------- balancing


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: str | Sequence[str] | None = None,
    dtype: str | torch.dtype | None = None,
    special_dtypes: Mapping[str, str | torch.dtype] | None = None,
    low_zero: bool = False,
) -> dict[int | str, int]:
    """A `max_memory` for `infer_auto_device_map` under which accelerators get alike much of a model.

    Args:
        model: may be on the meta device.
        max_memory: bytes (or texts) a device may take at most; None for what is free now.
        no_split_module_classes: see `infer_auto_device_map`.
        dtype: see `infer_auto_device_map`.
        special_dtypes: see `infer_auto_device_map`.
        low_zero: leave accelerator 0 as empty as possible.
    """
    memory = get_max_memory(max_memory)
    numbers = sorted(key for key, size in memory.items() if isinstance(key, int) and size > 0)
    count = len(numbers) + (memory.get("mps", 0) > 0)
    if count == 0:
        return memory
    if count == 1:
        low_zero = False
        if max_memory is None:  # what a forward pass needs has to fit as well
            memory.update({number: int(memory[number] * 0.9) for number in numbers})
    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes)
    share = sizes[""] // (count - 1 if low_zero else count)
    whole = _largest_whole(model, sizes, _class_names(no_split_module_classes))
    share += int(1.25 * max(whole, _mean(sizes)))
    for number in numbers[:-1]:  # the last one takes what is left
        memory[number] = min(memory[0] if low_zero and number == 0 else share, memory[number])
    if low_zero and 0 in memory:
        rest = sizes[""] - sum(memory[number] for number in numbers if number != 0)
        memory[0] = min(max(0, rest), memory[0])
    return memory


def _largest_whole(model: nn.Module, sizes: Mapping[str, int], whole: Sequence[str]) -> int:
    """Bytes of the largest of the first modules of each class that must not be split."""
    first: dict[str, int] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name and name in sizes and kind in whole and kind not in first:
            first[kind] = sizes[name]
    return max(first.values(), default=0)


def _mean(sizes: Mapping[str, int]) -> int:
    """The mean size of the modules that hold tensors and no further modules, bytes."""
    tensors = _leaves(sizes)
    modules = {name: size for name, size in sizes.items() if name not in tensors}
    leaves = _leaves(modules)
    return sum(modules[name] for name in leaves) // max(len(leaves), 1)


def _leaves(sizes: Mapping[str, int]) -> set[str]:
    parents = {name.rpartition(".")[0] for name in sizes}
    return {name for name in sizes if name and name not in parents}
