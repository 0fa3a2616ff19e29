"""Callbacks around a module's forward, with its keyword arguments: what offloading is built on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

__all__ = [
    "ModelHook",
    "SequentialHook",
    "add_hook_to_module",
    "hook_of",
    "remove_hook_from_module",
    "remove_hook_from_submodules",
]

# transformers and others look for these names on modules.
_HOOK = "_hf_hook"
_FORWARD = "_old_forward"
_GUARDED = ("to", "cuda")


class ModelHook:
    """What happens around a module's forward; each method does nothing unless it is overridden.

    Attributes:
        no_grad: run the forward without recording gradients.
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is added; returns the module."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Called before the forward; returns its arguments."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Called after the forward; returns its output."""
        return output

    def failed(self, module: nn.Module) -> None:
        """Called instead of `post_forward` if the forward raised."""

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Called when the hook is removed; returns the module."""
        return module


class SequentialHook(ModelHook):
    """Several hooks, one after the other.

    Args:
        hooks: in the order in which they are called.
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    def init_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def failed(self, module: nn.Module) -> None:
        for hook in self.hooks:
            hook.failed(module)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def hook_of(module: nn.Module) -> ModelHook | None:
    """The hook of a module; None if it has none."""
    hook: ModelHook | None = module.__dict__.get(_HOOK)
    return hook


def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> nn.Module:
    """Put a hook around a module's forward.

    Args:
        module: changed in place.
        hook: what to call.
        append: after a hook that is there already, which is replaced otherwise.

    Returns:
        The module.
    """
    before = hook_of(module)
    if append and before is not None:
        remove_hook_from_module(module)
        hook = SequentialHook(before, hook)
    forward: Any = module.__dict__.get(_FORWARD, module.forward)
    module = hook.init_hook(module)
    module.__dict__[_HOOK], module.__dict__[_FORWARD] = hook, forward
    # The signature stays visible: callers look at it to see which arguments there are.
    module.__dict__["forward"] = functools.update_wrapper(functools.partial(_hooked, module), forward)
    return module


def _hooked(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    hook: ModelHook = module.__dict__[_HOOK]
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    try:
        if hook.no_grad:
            with torch.no_grad():
                output = module.__dict__[_FORWARD](*args, **kwargs)
        else:
            output = module.__dict__[_FORWARD](*args, **kwargs)
    except BaseException:
        hook.failed(module)
        raise
    return hook.post_forward(module, output)


def remove_hook_from_module(module: nn.Module, recurse: bool = False) -> nn.Module:
    """Take a module's hook away; its forward is what it was.

    Args:
        module: changed in place.
        recurse: those of the modules in it too.

    Returns:
        The module.
    """
    hook = module.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.detach_hook(module)
    forward = module.__dict__.pop(_FORWARD, None)
    if forward is not None:
        module.__dict__.pop("forward", None)
        if getattr(forward, "__func__", None) is not type(module).forward:
            module.__dict__["forward"] = forward  # one that somebody had put there before
    for name in _GUARDED:
        module.__dict__.pop(name, None)
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Take away the hooks of a module and of all modules in it."""
    remove_hook_from_module(module, recurse=True)
