"""Does a saved optimizer fit a live one, whose tensors are then read in place? Nothing is changed here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from keepstep.checkpoint.format.manifest import TensorEntry
from keepstep.checkpoint.loading.live import call_load, state_of
from keepstep.checkpoint.loading.plan import PLAIN_TENSORS, ObjectPath, Plan, tensor_address
from keepstep.tree import DTYPES, elements_of, inside_object, items_of, type_name

__all__ = ["fit_optimizer"]


def fit_optimizer(plan: Plan, node: Any, optimizer: torch.optim.Optimizer, path: ObjectPath) -> None:
    """Add a live optimizer to the plan: its tensors take the saved bytes, the rest is set at the end.

    Args:
        plan: of the restore.
        node: what was saved for it.
        optimizer: whose state dict is PyTorch's own (see `takes_plain_state`).
        path: of the optimizer.
    """
    saved = dict(items_of(inside_object(node)) or ())
    if set(saved) != {"state", "param_groups"}:
        plan.differs(path, "saved as something else than an optimizer")
        return
    if not _same_groups(plan, saved["param_groups"], optimizer, path):
        return
    if not _same_options(plan, node, saved["param_groups"], optimizer, path):
        return
    live = state_of(optimizer, path)["state"]
    params = dict(enumerate(param for group in optimizer.param_groups for param in group["params"]))
    plan.read_fresh(saved["param_groups"])  # a learning rate may be a tensor
    state: dict[Any, Any] = {}
    for key, entry_node in items_of(saved["state"]) or ():
        entry = items_of(entry_node)
        if entry is None:
            plan.read_fresh(entry_node)
            state[key] = entry_node
            continue
        here = live.get(key, {})
        state[key] = {
            name: _slot(plan, value, here.get(name), (*path, "state", key, name), params.get(key))
            for name, value in entry
        }
    plan.settling.append(lambda: _settled(plan, optimizer, state, saved["param_groups"], path))


def _same_groups(plan: Plan, groups_node: Any, optimizer: torch.optim.Optimizer, path: ObjectPath) -> bool:
    groups = (elements_of(groups_node) or ([], False))[0]
    saved_sizes = [len(elements_of(dict(items_of(group) or ()).get("params"))[0]) for group in groups]  # type: ignore[index]
    live_sizes = [len(group["params"]) for group in optimizer.param_groups]
    if saved_sizes != live_sizes:
        plan.differs(
            path,
            f"parameters per group were {saved_sizes} when saved, but are "
            f"{live_sizes} in the live {type(optimizer).__name__}",
        )
    return saved_sizes == live_sizes


def _same_options(
    plan: Plan, node: Any, groups_node: Any, optimizer: torch.optim.Optimizer, path: ObjectPath
) -> bool:
    """PyTorch would take another optimizer's state, and fail (or train wrongly) at the next step."""
    was = node.get("$object", "an optimizer")
    if was == type_name(type(optimizer)):
        return True  # the same one; a newer PyTorch may know more options
    groups = (elements_of(groups_node) or ([], False))[0]
    names = [{name for name, _ in items_of(group) or ()} for group in groups]
    lacking = {name for name in optimizer.defaults for known in names if name not in known}
    if lacking:
        plan.differs(
            path,
            f"saved by {was}, without {', '.join(sorted(lacking))}, which the live "
            f"{type(optimizer).__name__} needs",
        )
    return not lacking


def _slot(plan: Plan, node: Any, live: Any, path: ObjectPath, param: torch.Tensor | None) -> Any:
    """An optimizer's value: its live tensor if that can take the bytes, else the node, read afresh."""
    address = tensor_address(node)
    if address is None:
        plan.read_fresh(node)
        return node
    entry = plan.reader.entry(address)
    if live is None and param is not None and type(param) not in PLAIN_TENSORS:
        live = _sharded_like(param, entry)
    if isinstance(live, torch.Tensor) and _same_kind(entry, live):
        plan.take(path, address, live)
        return live
    plan.fresh.add(address)
    return node


def _settled(
    plan: Plan, optimizer: torch.optim.Optimizer, state: Any, groups: Any, path: ObjectPath
) -> Callable[[], None]:
    def real(value: Any) -> Any:
        return value if isinstance(value, torch.Tensor) else plan.decode(value)

    decoded = {
        key: {name: real(value) for name, value in entry.items()}
        if not _is_encoded(entry)
        else plan.decode(entry)
        for key, entry in state.items()
    }
    whole = {"state": decoded, "param_groups": plan.decode(groups)}

    def finish() -> None:
        call_load(optimizer, whole, path)
        _undo_casts(optimizer, decoded)

    return finish


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


def _is_encoded(entry: Any) -> bool:
    return not isinstance(entry, dict) or any(type(key) is str and key.startswith("$") for key in entry)


def _sharded_like(param: torch.Tensor, entry: TensorEntry) -> torch.Tensor | None:
    """What an optimizer that has taken no step yet will hold for a distributed parameter."""
    if entry.shape != tuple(param.shape):
        return None
    return torch.zeros_like(param.detach(), dtype=DTYPES[entry.dtype])


def _same_kind(entry: TensorEntry, live: torch.Tensor) -> bool:
    return entry.shape == tuple(live.shape) and entry.dtype == str(live.dtype).removeprefix("torch.")
