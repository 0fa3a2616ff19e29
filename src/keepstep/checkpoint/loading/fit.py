"""Does a checkpoint fit the live objects? Phase 1 of a restore; nothing is changed here.

The saved tree and the live objects are walked side by side. What comes out is a plan: which live tensor
takes which saved bytes, which objects are handed their state, what is set at the end; or all differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from keepstep.checkpoint.format.boxes import Box
from keepstep.checkpoint.format.manifest import TensorEntry
from keepstep.checkpoint.loading.reader import Reader
from keepstep.checkpoint.loading.sharing import Place, shared_memory_problems
from keepstep.errors import ManifestError, MismatchError, RestoreError, StateError
from keepstep.tree import (
    DTYPES,
    address_of,
    elements_of,
    flatten,
    has_codec,
    inside_object,
    is_stateful,
    items_of,
    shard_of,
    tensors_in,
    type_name,
    unflatten,
)

__all__ = ["Fit", "Handed", "call_load", "over_untrusted", "state_of"]

_Path = tuple[Any, ...]


def over_untrusted(reader: Reader, work: Callable[[], Any]) -> Any:
    """Run code over the untrusted tree; what it can't read is a damaged manifest."""
    try:
        return work()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if type(error) in {ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError}:
            raise ManifestError(reader.place, f"state.json: {error}") from error
        raise


@dataclass(frozen=True, slots=True)
class Handed:
    """An object that takes its state through its own load_state_dict."""

    path: _Path
    owner: Any
    node: Any


@dataclass(slots=True)
class Fit:
    """Walks a saved tree and live objects side by side; collects the plan, or every difference."""

    reader: Reader
    places: list[Place] = field(default_factory=list)
    handed_over: list[Handed] = field(default_factory=list)
    settling: list[Callable[[], Callable[[], None]]] = field(default_factory=list)
    fresh: set[str] = field(default_factory=set)
    fresh_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    def settle(self) -> list[Callable[[], None]]:
        """Read and decode all values that are set at the end; what is left is to set them."""
        self.fresh_tensors.update(self.reader.fresh(self.fresh))
        return [decoded() for decoded in self.settling]

    def raise_if_any(self) -> None:
        self.different += shared_memory_problems(self.reader, self.places)
        if self.missing or self.unexpected or self.different:
            raise MismatchError(
                f"{self.reader.place} does not fit the live objects; nothing was changed. Build the "
                'objects as they were when it was saved, or load a part of it with only="model"',
                missing=self.missing,
                unexpected=self.unexpected,
                different=self.different,
            )

    def walk(self, node: Any, live: Any, path: _Path, assign: Callable[[Any], None] | None) -> None:
        if isinstance(live, torch.nn.Module):
            self._module(inside_object(node), live, path)
        elif isinstance(live, torch.optim.Optimizer) and _takes_plain_state(live):
            self._optimizer(node, live, path)
        elif isinstance(live, torch.Tensor):
            self._tensor(node, live, path)
        elif isinstance(live, np.ndarray):
            self._array(node, live, path)
        elif has_codec(live) or isinstance(live, torch.Size):
            self._value(node, live, path, assign)
        elif is_stateful(live):
            self.handed_over.append(Handed(path, live, inside_object(node)))
        elif isinstance(live, dict):
            self._dict(inside_object(node), live, path)
        elif isinstance(live, list | tuple) and not _is_plain_twin(node, live):
            self._sequence(inside_object(node), live, path)
        elif isinstance(live, list):
            self._value(node, live, path, _filler(live))
        else:
            self._value(node, live, path, assign)

    # Each kind of live thing -----------------------------------------------------------------

    def _module(self, node: Any, module: torch.nn.Module, path: _Path) -> None:
        state = state_of(module, path)
        saved = self._compare_keys(node, state, path, "a module")
        if saved is None:
            return
        if unshaped := [key for key, value in state.items() if torch.nn.parameter.is_lazy(value)]:
            self.different += [f"{address_of((*path, key))}: {_UNSHAPED}" for key in unshaped]
            return
        plain = not any(not isinstance(value, torch.Tensor) for value in state.values())
        if not (plain and _is_live_memory(module, state)):
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and key in saved:
                    self._tensor(saved[key], value, (*path, key), read=False)
            self.handed_over.append(Handed(path, module, node))
            return
        for key, value in state.items():
            if key in saved:
                self._tensor(saved[key], value, (*path, key))
        if _has_loading_code(module):  # it may rebuild caches; the values are the live ones already
            self.settling.append(lambda: lambda: call_load(module, state, path))

    def _optimizer(self, node: Any, optimizer: torch.optim.Optimizer, path: _Path) -> None:
        saved = dict(items_of(inside_object(node)) or ())
        if set(saved) != {"state", "param_groups"}:
            self.different.append(f"{address_of(path)}: saved as something else than an optimizer")
            return
        if not self._same_groups(saved["param_groups"], optimizer, path):
            return
        if not self._same_options(node, saved["param_groups"], optimizer, path):
            return
        live = state_of(optimizer, path)["state"]
        params = dict(enumerate(param for group in optimizer.param_groups for param in group["params"]))
        self.fresh.update(tensors_in(saved["param_groups"]))  # a learning rate may be a tensor
        state: dict[Any, Any] = {}
        for key, entry_node in items_of(saved["state"]) or ():
            entry = items_of(entry_node)
            if entry is None:
                self.fresh.update(tensors_in(entry_node))
                state[key] = entry_node
                continue
            here = live.get(key, {})
            state[key] = {
                name: self._slot(value, here.get(name), (*path, "state", key, name), params.get(key))
                for name, value in entry
            }
        self.settling.append(lambda: self._settle_optimizer(optimizer, state, saved["param_groups"], path))

    def _same_groups(self, groups_node: Any, optimizer: torch.optim.Optimizer, path: _Path) -> bool:
        groups = (elements_of(groups_node) or ([], False))[0]
        saved_sizes = [len(elements_of(dict(items_of(group) or ()).get("params"))[0]) for group in groups]  # type: ignore[index]
        live_sizes = [len(group["params"]) for group in optimizer.param_groups]
        if saved_sizes != live_sizes:
            self.different.append(
                f"{address_of(path)}: parameters per group were {saved_sizes} when saved, but are "
                f"{live_sizes} in the live {type(optimizer).__name__}"
            )
        return saved_sizes == live_sizes

    def _same_options(
        self, node: Any, groups_node: Any, optimizer: torch.optim.Optimizer, path: _Path
    ) -> bool:
        """PyTorch would take another optimizer's state, and fail (or train wrongly) at the next step."""
        was = node.get("$object", "an optimizer")
        if was == type_name(type(optimizer)):
            return True  # the same one; a newer PyTorch may know more options
        groups = (elements_of(groups_node) or ([], False))[0]
        names = [{name for name, _ in items_of(group) or ()} for group in groups]
        lacking = {name for name in optimizer.defaults for known in names if name not in known}
        if lacking:
            self.different.append(
                f"{address_of(path)}: saved by {was}, without {', '.join(sorted(lacking))}, which the live "
                f"{type(optimizer).__name__} needs"
            )
        return not lacking

    def _slot(self, node: Any, live: Any, path: _Path, param: torch.Tensor | None) -> Any:
        """An optimizer's value: its live tensor if that can take the bytes, else the node, read afresh."""
        address = _tensor_address(node)
        if address is None:
            self.fresh.update(tensors_in(node))
            return node
        entry = self.reader.entry(address)
        if live is None and param is not None and type(param) not in _PLAIN_TENSORS:
            live = _sharded_like(param, entry)
        if isinstance(live, torch.Tensor) and _same_kind(entry, live):
            self._take(path, address, live)
            return live
        self.fresh.add(address)
        return node

    def _settle_optimizer(
        self, optimizer: torch.optim.Optimizer, state: Any, groups: Any, path: _Path
    ) -> Callable[[], None]:
        def real(value: Any) -> Any:
            return value if isinstance(value, torch.Tensor) else self.decode(value)

        decoded = {
            key: {name: real(value) for name, value in entry.items()}
            if not _is_encoded(entry)
            else self.decode(entry)
            for key, entry in state.items()
        }
        whole = {"state": decoded, "param_groups": self.decode(groups)}

        def finish() -> None:
            call_load(optimizer, whole, path)
            _undo_casts(optimizer, decoded)

        return finish

    def _tensor(self, node: Any, live: torch.Tensor, path: _Path, *, read: bool = True) -> None:
        address = _tensor_address(node)
        if address is None:
            self.different.append(f"{address_of(path)}: a tensor here, saved as another kind of value")
            return
        entry = self.reader.entry(address)
        dtype = str(live.dtype).removeprefix("torch.")
        if live.is_meta or live.layout is not torch.strided:
            self.different.append(
                f"{address_of(path)}: the live tensor ({live.layout} on {live.device}) has no plain memory "
                "to read into; materialize it first (to_empty, to_dense)"
            )
        elif entry.shape != tuple(live.shape) or entry.dtype != dtype:
            self.different.append(
                f"{address_of(path)}: saved with shape {list(entry.shape)} and dtype {entry.dtype}, "
                f"live with shape {list(live.shape)} and dtype {dtype}"
            )
        elif any(step == 0 and size > 1 for step, size in zip(live.stride(), live.shape, strict=True)):
            self.different.append(
                f"{address_of(path)}: the live tensor is expanded, its elements share memory; clone it"
            )
        elif read:
            self._take(path, address, live)

    def _array(self, node: Any, live: np.ndarray[Any, Any], path: _Path) -> None:
        saved = node if isinstance(node, dict) and "$ndarray" in node else None
        if saved is None or saved["dtype"] != live.dtype.str or tuple(saved["shape"]) != live.shape:
            was = "no array" if saved is None else f"shape {saved['shape']} and dtype {saved['dtype']}"
            self.different.append(
                f"{address_of(path)}: saved with {was}, live with shape {list(live.shape)} "
                f"and dtype {live.dtype.str}"
            )
            return
        if not live.flags.writeable:
            self.different.append(f"{address_of(path)}: the live array is read-only")
            return
        self.fresh.update(tensors_in(node))
        self.settling.append(lambda: functools.partial(np.copyto, live, self.decode(node)))

    def _dict(self, node: Any, live: dict[Any, Any], path: _Path) -> None:
        saved = self._compare_keys(node, live, path, "a dict")
        for key in live if saved is not None else ():
            if saved is not None and key in saved:
                self.walk(saved[key], live[key], (*path, key), _setter(live, key))

    def _sequence(self, node: Any, live: list[Any] | tuple[Any, ...], path: _Path) -> None:
        found = elements_of(node)
        if found is None or found[1] != isinstance(live, tuple) or len(found[0]) != len(live):
            was = (
                "another kind of value"
                if found is None
                else f"a {'tuple' if found[1] else 'list'} of {len(found[0])}"
            )
            self.different.append(
                f"{address_of(path)}: saved as {was}, live a {type(live).__name__} of {len(live)}"
            )
            return
        for index, (item_node, item) in enumerate(zip(found[0], live, strict=True)):
            setter = _setter(live, index) if isinstance(live, list) else None
            self.walk(item_node, item, (*path, index), setter)

    def _value(self, node: Any, live: Any, path: _Path, assign: Callable[[Any], None] | None) -> None:
        if assign is not None:
            self.fresh.update(tensors_in(node))
            self.settling.append(lambda: functools.partial(assign, self.decode(node)))
            return
        if node != _encoded(live):
            self.different.append(
                f"{address_of(path)}: saved with another value than the live {live!r:.60}, which can't be set"
            )

    # Helpers of the walk ---------------------------------------------------------------------

    def _take(self, path: _Path, address: str, live: torch.Tensor) -> None:
        """The saved bytes go to the live tensor, or the part of a distributed one that this rank holds."""
        try:
            part = None if type(live) in _PLAIN_TENSORS else shard_of(live)
        except (RuntimeError, ValueError) as error:  # says nothing about the checkpoint
            self.different.append(
                f"{address_of(path)}: the live distributed tensor can't say which part of it lies here "
                f"({error}); redistribute it to Shard or Replicate placements first"
            )
            return
        if part is None:
            self.places.append(Place(path, address, live))
        elif part[0].numel():
            self.places.append(Place(path, address, part[0], Box(part[1], tuple(part[0].shape))))

    def _compare_keys(
        self, node: Any, live: Mapping[Any, Any], path: _Path, kind: str
    ) -> dict[Any, Any] | None:
        items = items_of(node)
        if items is None:
            self.different.append(
                f"{address_of(path) or 'the root'}: {kind} here, saved as another kind of value"
            )
            return None
        saved = dict(items)
        self.missing += [address_of((*path, key)) for key in live if key not in saved]
        self.unexpected += [address_of((*path, key)) for key in saved if key not in live]
        return saved

    def decode(self, node: Any) -> Any:
        """A saved value; its tensors were read by then."""
        return unflatten(node, self.fresh_tensors.__getitem__)


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


def _tensor_address(node: Any) -> str | None:
    return node["$tensor"] if type(node) is dict and "$tensor" in node else None


def _is_encoded(entry: Any) -> bool:
    return not isinstance(entry, dict) or any(type(key) is str and key.startswith("$") for key in entry)


def _sharded_like(param: torch.Tensor, entry: TensorEntry) -> torch.Tensor | None:
    """What an optimizer that has taken no step yet will hold for a distributed parameter."""
    if entry.shape != tuple(param.shape):
        return None
    return torch.zeros_like(param.detach(), dtype=DTYPES[entry.dtype])


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def _same_kind(entry: TensorEntry, live: torch.Tensor) -> bool:
    return entry.shape == tuple(live.shape) and entry.dtype == str(live.dtype).removeprefix("torch.")


# ------------------------------------------------------------------------- modules and optimizers


def _is_live_memory(module: torch.nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether the module's state dict shows its own parameters and buffers, not copies of them."""
    live: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
    live.update(module.named_buffers(remove_duplicate=False))
    return all(
        key in live
        and live[key].data_ptr() == value.data_ptr()
        and live[key].shape == value.shape
        and live[key].stride() == value.stride()
        for key, value in state.items()
    )


def _has_loading_code(module: torch.nn.Module) -> bool:
    """Whether some submodule does more on load_state_dict than copying tensors."""
    return any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or not type(part)._load_from_state_dict.__module__.startswith("torch.nn.")
        or type(part).load_state_dict is not torch.nn.Module.load_state_dict
        for part in module.modules()
    )


def _takes_plain_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's state dict is PyTorch's own, so that its tensors can be read in place."""
    kind = type(optimizer)
    return (
        kind.state_dict is torch.optim.Optimizer.state_dict
        and kind.load_state_dict is torch.optim.Optimizer.load_state_dict
        and not optimizer._optimizer_state_dict_post_hooks
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_pre_hooks
    )


def _undo_casts(optimizer: torch.optim.Optimizer, state: Mapping[Any, Any]) -> None:
    """PyTorch casts loaded state to the parameter's dtype; float32 state of bfloat16 weights must survive."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, entry in state.items():
        if not isinstance(index, int) or not isinstance(entry, dict):
            continue
        kept = optimizer.state[params[index]]
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and kept[name].dtype != value.dtype:
                kept[name] = value.to(kept[name].device)


def state_of(owner: Any, path: _Path) -> Any:
    """Ask a live object for its state; what it raises says nothing about the checkpoint."""
    try:
        return owner.state_dict()
    except Exception as error:
        raise RestoreError(
            f"{address_of(path) or 'the root'}: {type(owner).__name__}.state_dict raised {error!r}"
        ) from error


def call_load(owner: Any, state: Any, path: _Path) -> None:
    """Call `load_state_dict`; whatever it raises becomes a RestoreError that names the object."""
    try:
        owner.load_state_dict(state)
    except Exception as error:
        raise RestoreError(
            f"{address_of(path) or 'the root'}: {type(owner).__name__}.load_state_dict refused its saved "
            f"state: {error!r}"
        ) from error
