"""How values read: sizes, ages, counts, metrics; and text from a checkpoint made safe to show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = [
    "age",
    "compact",
    "counted",
    "exact",
    "human_bytes",
    "jsonable",
    "moment",
    "printable",
]

_MINUTE_S = 60
_HOUR_S = 60 * _MINUTE_S
_DAY_S = 24 * _HOUR_S


def printable(text: str) -> str:
    r"""`text` with every character that a terminal might act on written as an escape.

    Control characters, line ends, marks that turn the direction of writing, and bytes of file names that
    are no UTF-8 come out as `\x1b`, `\n`, `\u202e`, `\xff`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    if "\udc80" <= char <= "\udcff":  # how Python carries a byte that is no UTF-8
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def human_bytes(size: int) -> str:
    """Three digits and a decimal unit: "7.17 MB"."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        value /= 1000
        if value < 999.5 or unit == "PB":
            break
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def counted(count: int, noun: str) -> str:
    """A number and its noun: "1 checkpoint", "1,024 checkpoints"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def moment(created_at: str) -> datetime | None:
    """A manifest's time; None if it is none."""
    try:
        when = datetime.fromisoformat(created_at)
        return when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def age(created_at: str, now: datetime) -> str:
    """How long ago within a week ("12 min ago"), else the date; what is no time is given back as it is."""
    when = moment(created_at)
    if when is None:
        return created_at
    seconds = (now - when).total_seconds()
    if 0 <= seconds < _MINUTE_S:
        return f"{seconds:.0f} s ago"
    if 0 <= seconds < _HOUR_S:
        return f"{seconds // _MINUTE_S:.0f} min ago"
    if 0 <= seconds < _DAY_S:
        return f"{seconds // _HOUR_S:.0f} h ago"
    if 0 <= seconds < 7 * _DAY_S:
        return f"{seconds // _DAY_S:.0f} d ago"
    return f"{when:%Y-%m-%d}" if seconds >= 0 else f"{when:%Y-%m-%d %H:%M}"


def compact(value: float | int | str | bool) -> str:
    """A metric in at most six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def exact(value: float | int | str | bool) -> str:
    """A metric with every digit that it has."""
    return value if isinstance(value, str) else repr(value)


def jsonable(value: Any) -> Any:
    """`value` for strict JSON: NaN and infinities become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    return value
