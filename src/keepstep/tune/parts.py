"""What a user handed over is what it should be; said where it is handed over."""

from __future__ import annotations

from typing import Any

from keepstep.errors import UsageError

__all__ = ["check_kind", "check_part"]


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Refuse what is of none of these types.

    Args:
        name: of the argument.
        value: what was handed over; None is allowed.
        kinds: what it may be.
        expected: the same, in words.

    Raises:
        UsageError: it is something else.
    """
    number = not isinstance(kinds, tuple) and issubclass(kinds, int)
    if value is None or (isinstance(value, kinds) and not (number and isinstance(value, bool))):
        return
    raise UsageError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")


def check_part(name: str, value: Any, method: str, expected: str) -> None:
    """Refuse what lacks a method, and a class where an object is needed.

    Args:
        name: of the argument.
        value: what was handed over; None is allowed.
        method: what such an object has.
        expected: in words.

    Raises:
        UsageError: it can't be such an object.
    """
    if isinstance(value, type) and hasattr(value, method):
        raise UsageError(f"{name} is the class {value.__name__}; make one of it: {value.__name__}(...)")
    if value is not None and not hasattr(value, method):
        raise UsageError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
