"""Models that only a configuration of transformers' describes: made without memory, and counted."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from keepstep.errors import UsageError
from keepstep.models.empty import init_empty_weights

__all__ = ["count_from_config"]


def count_from_config(path: Path) -> dict[str, int]:
    """Numbers in each tensor of the model that a `config.json` describes, by name; runs none of its own code.

    Raises:
        UsageError: transformers knows no such model.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(path.parent, local_files_only=True)
        names = json.loads(path.read_bytes()).get("architectures") or []
        known = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
        with init_empty_weights():
            model = known[0](config) if known else transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UsageError(f"transformers cannot make a model of {path}: {first}") from None
    saved = set(model.state_dict())
    # Each parameter once, however many names it has.
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.numel() for name, tensor in named if name in saved}
