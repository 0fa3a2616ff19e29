"""Compiled models."""

from __future__ import annotations

import torch

from keepstep.train.settings.plugins import TorchDynamoPlugin

__all__ = ["compiled"]


def compiled(model: torch.nn.Module, plugin: TorchDynamoPlugin) -> torch.nn.Module:
    """Compile a model as a plugin says.

    Args:
        model: one that is compiled already stays as it is.
        plugin: with `use_regional_compilation`, blocks that repeat are compiled one by one, in place, and the
            first one's code serves all.
    """
    if plugin.backend == "no" or hasattr(model, "_orig_mod"):
        return model
    options = plugin.to_kwargs()
    blocks = _repeated_blocks(model) if plugin.use_regional_compilation else []
    for block in blocks:
        block.compile(**options)
    return model if blocks else torch.compile(model, **options)  # type: ignore[return-value]


def _repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    found: list[torch.nn.Module] = []
    for module in model.modules():
        kinds = {type(block) for block in module.children()}
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and len(kinds) == 1:
            found += list(module)
    return found
