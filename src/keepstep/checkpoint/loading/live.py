"""What live objects say of themselves, and the two calls that they answer: state_dict, load_state_dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from keepstep.errors import RestoreError
from keepstep.tree import address_of

__all__ = [
    "call_load",
    "has_loading_code",
    "is_live_memory",
    "outermost_loaders",
    "state_of",
    "takes_plain_state",
]


def state_of(owner: Any, path: tuple[Any, ...]) -> Any:
    """Ask a live object for its state; what it raises says nothing about the checkpoint."""
    try:
        return owner.state_dict()
    except Exception as error:
        raise RestoreError(
            f"{address_of(path) or 'the root'}: {type(owner).__name__}.state_dict raised {error!r}"
        ) from error


def call_load(owner: Any, state: Any, path: tuple[Any, ...]) -> None:
    """Call `load_state_dict`; whatever it raises becomes a RestoreError that names the object."""
    try:
        owner.load_state_dict(state)
    except Exception as error:
        raise RestoreError(
            f"{address_of(path) or 'the root'}: {type(owner).__name__}.load_state_dict refused its saved "
            f"state: {error!r}"
        ) from error


def is_live_memory(module: torch.nn.Module, state: Mapping[str, Any]) -> bool:
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


def has_loading_code(module: torch.nn.Module) -> bool:
    """Whether some submodule does more on load_state_dict than copying tensors."""
    return any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or _loads_by_itself(part)
        or type(part).load_state_dict is not torch.nn.Module.load_state_dict
        for part in module.modules()
    )


def _loads_by_itself(part: torch.nn.Module) -> bool:
    return not type(part)._load_from_state_dict.__module__.startswith("torch.nn.")


def outermost_loaders(module: torch.nn.Module, keys: Iterable[str]) -> list[str]:
    """Names of submodules that own one of these tensors and load in a way of their own.

    Of one that is inside another of them, the outer one is named.
    """
    owners = {key.rpartition(".")[0] for key in keys}
    found: list[str] = []
    for name in sorted(owner for owner in owners if _loads_by_itself(module.get_submodule(owner))):
        if not any(f"{name}.".startswith(f"{outer}.") or not outer for outer in found):
            found.append(name)
    return found


def takes_plain_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's state dict is PyTorch's own, so that its tensors can be read in place."""
    kind = type(optimizer)
    return (
        kind.state_dict is torch.optim.Optimizer.state_dict
        and kind.load_state_dict is torch.optim.Optimizer.load_state_dict
        and not optimizer._optimizer_state_dict_post_hooks
        and not optimizer._optimizer_state_dict_pre_hooks
        and not optimizer._optimizer_load_state_dict_pre_hooks
    )
