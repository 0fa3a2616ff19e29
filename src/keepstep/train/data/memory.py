"""What a sampler or a stream remembers between passes, so that a fresh one can be brought to the same point.

One with `state_dict` and `load_state_dict` is asked. Of any other one, the plain attributes that have
moved since it was prepared are what it remembers: `self.epoch += 1` in `__iter__` is the common case. Options
given at construction don't move, so a changed option is never overwritten by a saved one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["PassMemory", "sampler_parts"]

_PLAIN = (bool, int, float, str, type(None))
_ABSENT = object()


class PassMemory:
    """Reads and writes what a loader's samplers, or its stream, remember.

    Args:
        parts: the samplers or streams, outermost first, as they are before the first pass.
        asked: those with a state of their own are asked for it. Otherwise their plain attributes are what
            they remember, too.
    """

    def __init__(self, parts: Sequence[Any], *, asked: bool = True) -> None:
        self._parts = parts
        self._asked = asked
        self._at_start = [_plain_attributes(part) for part in self._parts]

    def read(self) -> list[dict[str, Any]]:
        """Return what each part remembers now, in their order."""
        return [self._read(part, start) for part, start in zip(self._parts, self._at_start, strict=True)]

    def _read(self, part: Any, at_start: dict[str, Any]) -> dict[str, Any]:
        if self._is_asked(part):
            return {"state": part.state_dict()}
        now = _plain_attributes(part)
        moved = {name: value for name, value in now.items() if value != at_start.get(name, _ABSENT)}
        return {"moved": moved} if moved else {}

    def _is_asked(self, part: Any) -> bool:
        return self._asked and _has_state(part)

    def write(self, remembered: list[dict[str, Any]]) -> None:
        """Bring each part to where it was when `remembered` was read."""
        for part, start, memory in zip(self._parts, self._at_start, remembered, strict=False):
            if "state" in memory and self._is_asked(part):
                part.load_state_dict(memory["state"])
            elif not self._is_asked(part):
                # What had not moved when it was read may have moved since; what was made since is kept.
                for name, value in {**start, **memory.get("moved", {})}.items():
                    now = getattr(part, name, _ABSENT)
                    if now is _ABSENT or (isinstance(now, _PLAIN) and now != value):
                        setattr(part, name, value)


def sampler_parts(sampler: Any) -> list[Any]:
    """A sampler and those that it wraps, outermost first."""
    parts: list[Any] = []
    waiting = [sampler]
    while waiting:
        part = waiting.pop(0)
        if any(part is seen for seen in parts):
            continue
        parts.append(part)
        waiting += [
            inner for name in ("batch_sampler", "sampler") if (inner := getattr(part, name, None)) is not None
        ]
    return parts


def _has_state(part: Any) -> bool:
    asks: list[Callable[..., Any] | None] = [
        getattr(part, name, None) for name in ("state_dict", "load_state_dict")
    ]
    return all(callable(ask) for ask in asks)


def _plain_attributes(part: Any) -> dict[str, Any]:
    attributes = getattr(part, "__dict__", {})
    return {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)}
