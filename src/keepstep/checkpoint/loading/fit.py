"""Does a checkpoint fit the live objects? Phase 1 of a restore; nothing is changed here.

The saved tree and the live objects are walked side by side. What comes out is a `Plan`: which live tensor
takes which saved bytes, which objects are handed their state, what is set at the end; or all differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from keepstep.checkpoint.loading.fit_optimizer import fit_optimizer
from keepstep.checkpoint.loading.live import (
    call_load,
    has_loading_code,
    is_live_memory,
    outermost_loaders,
    state_of,
    takes_plain_state,
)
from keepstep.checkpoint.loading.plan import Handed, ObjectPath, Plan, tensor_address
from keepstep.errors import StateError
from keepstep.tree import (
    address_of,
    elements_of,
    flatten,
    has_codec,
    inside_object,
    is_stateful,
    items_of,
)

__all__ = ["Fit"]


class Fit:
    """The walk; what it finds goes into the plan.

    Args:
        plan: of the restore.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def walk(self, node: Any, live: Any, path: ObjectPath, assign: Callable[[Any], None] | None) -> None:
        """Fit a live object to what was saved for it.

        Args:
            node: what was saved.
            live: the object.
            path: of the object.
            assign: sets another value in its place; None: it can't be replaced.
        """
        if isinstance(live, torch.nn.Module):
            self._module(inside_object(node), live, path)
        elif isinstance(live, torch.optim.Optimizer) and takes_plain_state(live):
            fit_optimizer(self._plan, node, live, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(node, live, path)
        elif isinstance(live, np.ndarray):
            self._array(node, live, path)
        elif has_codec(live) or isinstance(live, torch.Size):
            self._value(node, live, path, assign)
        elif is_stateful(live):
            self._plan.handed_over.append(Handed(path, live, inside_object(node)))
        elif isinstance(live, dict):
            self._dict(inside_object(node), live, path)
        elif isinstance(live, list | tuple) and not _is_plain_twin(node, live):
            self._sequence(inside_object(node), live, path)
        elif isinstance(live, list):
            self._value(node, live, path, _filler(live))
        else:
            self._value(node, live, path, assign)

    # Each kind of live thing -----------------------------------------------------------------

    def _module(self, node: Any, module: torch.nn.Module, path: ObjectPath) -> None:
        state = state_of(module, path)
        saved = self._compare_keys(node, state, path, "a module")
        if saved is None:
            return
        if unshaped := [key for key, value in state.items() if torch.nn.parameter.is_lazy(value)]:
            self._plan.different += [f"{address_of((*path, key))}: {_UNSHAPED}" for key in unshaped]
            return
        plain = not any(not isinstance(value, torch.Tensor) for value in state.values())
        if not (plain and is_live_memory(module, state)):
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and key in saved:
                    self._tensor(saved[key], value, (*path, key), read=False)
            self._plan.handed_over.append(Handed(path, module, node))
            return
        resized = self._resized(module, state, saved, path)
        for key, value in state.items():
            if key in saved and not key.startswith(resized):
                self._tensor(saved[key], value, (*path, key))
        if has_loading_code(module):  # it may rebuild caches; the values are the live ones already
            self._plan.settling.append(lambda: lambda: call_load(module, state_of(module, path), path))

    def _resized(
        self, module: torch.nn.Module, state: dict[str, Any], saved: dict[Any, Any], path: ObjectPath
    ) -> tuple[str, ...]:
        """Hand their state to parts that may give tensors another shape as they load; their prefixes.

        Observers of quantization do: their buffers have no size until they have seen a batch.
        """
        reshaped = [key for key, value in state.items() if key in saved and self._reshaped(saved[key], value)]
        names = outermost_loaders(module, reshaped)
        prefixes = tuple(f"{name}." if name else "" for name in names)
        for name, prefix in zip(names, prefixes, strict=True):
            own = {key.removeprefix(prefix): node for key, node in saved.items() if key.startswith(prefix)}
            place = (*path, name) if name else path
            self._plan.handed_over.append(Handed(place, module.get_submodule(name), own))
        return prefixes

    def _reshaped(self, node: Any, live: torch.Tensor) -> bool:
        address = tensor_address(node)
        if address is None or live.is_meta or live.layout is not torch.strided:
            return False
        entry = self._plan.reader.entry(address)
        same_kind = entry.dtype == str(live.dtype).removeprefix("torch.")
        return same_kind and entry.shape != tuple(live.shape)

    def _tensor(self, node: Any, live: torch.Tensor, path: ObjectPath, *, read: bool = True) -> None:
        address = tensor_address(node)
        if address is None:
            self._plan.differs(path, "a tensor here, saved as another kind of value")
            return
        entry = self._plan.reader.entry(address)
        dtype = str(live.dtype).removeprefix("torch.")
        if live.is_meta or live.layout is not torch.strided:
            self._plan.differs(
                path,
                f"the live tensor ({live.layout} on {live.device}) has no plain memory "
                "to read into; materialize it first (to_empty, to_dense)",
            )
        elif entry.shape != tuple(live.shape) or entry.dtype != dtype:
            self._plan.differs(
                path,
                f"saved with shape {list(entry.shape)} and dtype {entry.dtype}, "
                f"live with shape {list(live.shape)} and dtype {dtype}",
            )
        elif any(step == 0 and size > 1 for step, size in zip(live.stride(), live.shape, strict=True)):
            self._plan.differs(path, "the live tensor is expanded, its elements share memory; clone it")
        elif read:
            self._plan.take(path, address, live)

    def _array(self, node: Any, live: np.ndarray[Any, Any], path: ObjectPath) -> None:
        saved = node if isinstance(node, dict) and "$ndarray" in node else None
        if saved is None or saved["dtype"] != live.dtype.str or tuple(saved["shape"]) != live.shape:
            was = "no array" if saved is None else f"shape {saved['shape']} and dtype {saved['dtype']}"
            self._plan.differs(
                path, f"saved with {was}, live with shape {list(live.shape)} and dtype {live.dtype.str}"
            )
            return
        if not live.flags.writeable:
            self._plan.differs(path, "the live array is read-only")
            return
        self._plan.read_fresh(node)
        self._plan.settling.append(lambda: functools.partial(np.copyto, live, self._plan.decode(node)))

    def _dict(self, node: Any, live: dict[Any, Any], path: ObjectPath) -> None:
        saved = self._compare_keys(node, live, path, "a dict")
        for key in live if saved is not None else ():
            if saved is not None and key in saved:
                self.walk(saved[key], live[key], (*path, key), _setter(live, key))

    def _sequence(self, node: Any, live: list[Any] | tuple[Any, ...], path: ObjectPath) -> None:
        found = elements_of(node)
        if found is None or found[1] != isinstance(live, tuple) or len(found[0]) != len(live):
            was = (
                "another kind of value"
                if found is None
                else f"a {'tuple' if found[1] else 'list'} of {len(found[0])}"
            )
            self._plan.differs(path, f"saved as {was}, live a {type(live).__name__} of {len(live)}")
            return
        for index, (item_node, item) in enumerate(zip(found[0], live, strict=True)):
            setter = _setter(live, index) if isinstance(live, list) else None
            self.walk(item_node, item, (*path, index), setter)

    def _value(self, node: Any, live: Any, path: ObjectPath, assign: Callable[[Any], None] | None) -> None:
        if assign is not None:
            self._plan.read_fresh(node)
            self._plan.settling.append(lambda: functools.partial(assign, self._plan.decode(node)))
            return
        if node != _encoded(live):
            self._plan.differs(
                path, f"saved with another value than the live {live!r:.60}, which can't be set"
            )

    # Helpers of the walk ---------------------------------------------------------------------

    def _compare_keys(
        self, node: Any, live: Mapping[Any, Any], path: ObjectPath, kind: str
    ) -> dict[Any, Any] | None:
        items = items_of(node)
        if items is None:
            self._plan.differs(path, f"{kind} here, saved as another kind of value")
            return None
        saved = dict(items)
        self._plan.missing += [address_of((*path, key)) for key in live if key not in saved]
        self._plan.unexpected += [address_of((*path, key)) for key in saved if key not in live]
        return saved


def _encoded(value: Any) -> Any:
    """A plain value as it would be saved, so that NaN equals NaN; equal to nothing if it can't be."""
    try:
        return flatten(value).tree
    except StateError:
        return _NOTHING


_NOTHING: Any = object()

_UNSHAPED = "the live one is lazy and has no shape yet; run one batch through the module before restoring it"


def _is_plain_twin(node: Any, live: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list (or tuple) of nothing but plain values was saved as one, of whatever length."""
    found = elements_of(node)
    return found is not None and found[1] == isinstance(live, tuple) and not _holds_live(live)


def _holds_live(value: Any) -> bool:
    """Whether a list or tuple holds, at any depth, something that takes its state in place."""
    if isinstance(value, list | tuple):
        return any(_holds_live(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_live(item) for item in value.values())
    return isinstance(value, torch.Tensor | np.ndarray) or is_stateful(value)


def _filler(live: list[Any]) -> Callable[[Any], None]:
    """A list of plain values takes those that were saved, however many; it stays the same list."""

    def fill(values: list[Any]) -> None:
        live[:] = values

    return fill


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    def assign(value: Any) -> None:
        container[key] = value

    return assign
