"""What all `kwargs_handlers` are."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

__all__ = ["KwargsHandler"]


class KwargsHandler:
    """Options for something of torch's, as a dataclass: `AutocastKwargs`, `GradScalerKwargs` and so on."""

    def to_kwargs(self) -> dict[str, Any]:
        """Those options that are not as they are by default."""
        changed = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            made = field.default_factory
            default = field.default if made is MISSING else made()
            if value != default:
                changed[field.name] = value
        return changed
