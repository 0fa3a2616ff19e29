"""What schedulers are told is checked."""

from __future__ import annotations

import math

from keepstep.errors import UsageError

__all__ = ["check_flag", "check_number"]


def check_number(
    owner: object,
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse what is no finite number within bounds.

    Args:
        owner: whose argument it is.
        name: of the argument.
        value: its value.
        above: it must be greater.
        least: it must not be less.
        most: it must not be greater.
        whole: it must be a whole number.

    Raises:
        UsageError: it is not allowed; the message says what is.
    """
    bounds = []
    if above is not None:
        bounds.append(f"> {above:g}")
    if least is not None:
        bounds.append(f">= {least:g}")
    if most is not None:
        bounds.append(f"<= {most:g}")
    if (
        isinstance(value, int if whole else int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (above is None or value > above)
        and (least is None or value >= least)
        and (most is None or value <= most)
    ):
        return
    kind = " ".join(["a whole number" if whole else "a number", " and ".join(bounds)]).strip()
    raise UsageError(f"{type(owner).__name__} got {name}={value!r}; expected {kind}")


def check_flag(owner: object, name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(value, bool):
        raise UsageError(f"{type(owner).__name__} got {name}={value!r}; expected True or False")
