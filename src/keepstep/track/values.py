"""What is logged, as plain values: numbers out of tensors, and what a line of JSON can hold.

No torch here: a tensor, a NumPy scalar and anything like them are known by their `item()`.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from typing import Any, Final

from keepstep.errors import UsageError

__all__ = [
    "check_config",
    "checked_step",
    "from_json",
    "joined",
    "json_line",
    "plain_config",
    "split_config",
    "texts",
    "to_json",
    "with_numbers",
]

_MISSING: Final = object()
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def with_numbers(values: Any) -> dict[str, Any]:
    """What was given to `log()`, with every tensor of one element as a number; other values as they are.

    Raises:
        UsageError: it is no mapping, or has a key that is no string.
    """
    if not isinstance(values, Mapping):
        raise UsageError(
            f'log() takes a mapping of names to values, as {{"loss": 0.5}}; it was given {_shown(values)}'
        )
    found = {}
    for name, value in values.items():
        if not isinstance(name, str):
            raise UsageError(
                f"log() was given the name {name!r} ({type(name).__name__}); names must be strings: "
                f"{str(name)!r}"
            )
        found[name] = with_numbers(value) if isinstance(value, Mapping) else _number_of(value)
    return found


def _number_of(value: Any) -> Any:
    """The number that a tensor of one element holds; anything else as it is."""
    if type(value) in (bool, int, float, str) or value is None:
        return value
    count = getattr(value, "numel", None)
    count = count() if callable(count) else getattr(value, "size", None)
    if count == 1 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def checked_step(step: Any) -> int:
    """A step as an integer.

    Raises:
        UsageError: it is none.
    """
    try:
        if isinstance(step, bool):
            raise TypeError
        return operator.index(int(step) if isinstance(step, float) and step.is_integer() else step)
    except TypeError:
        raise UsageError(f"log(step={_shown(step)}): step must be an integer, or None to count on") from None


def to_json(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split values into those that JSON holds, and the names and kinds of the others.

    Numbers that are not finite become "NaN", "Infinity" and "-Infinity", as JSON has no names for them.

    Args:
        values: as `with_numbers` returns them.

    Returns:
        The values, and {name, nested ones joined by "/": kind of value} of what was left out.
    """
    kept: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            kept[name], inner = to_json(value)
            left_out.update((f"{name}/{key}", kind) for key, kind in inner.items())
        elif _is_plain(value):
            kept[name] = _finite(value)
        else:
            left_out[name] = f"{type(value).__module__}.{type(value).__qualname__}"
    return kept, left_out


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(name, str) and _is_plain(item) for name, item in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _finite(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def from_json(value: Any) -> Any:
    """Undo `to_json`: the three strings are numbers again."""
    if isinstance(value, dict):
        return {name: from_json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value


def json_line(value: Mapping[str, Any]) -> bytes:
    """A line of JSON, in UTF-8."""
    try:
        return f"{json.dumps(value, ensure_ascii=False, allow_nan=False)}\n".encode()
    except UnicodeEncodeError:  # half of a character, as in names of files that are no UTF-8
        return f"{json.dumps(value, allow_nan=False)}\n".encode()


def split_config(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration as nested dicts of plain values, paths as strings; and the names of what is neither."""
    refused: list[str] = []
    return _plain(values, "", refused), refused


def plain_config(values: Mapping[Any, Any], *, tracker: str) -> dict[str, Any]:
    """A configuration as nested dicts of plain values, as trackers take it.

    Raises:
        UsageError: a value is of a kind that they can't take; the message names all of them.
    """
    plain, refused = split_config(values)
    if refused:
        raise UsageError(
            f"{tracker} can't take these values of init_trackers(config=...): {', '.join(refused)}. "
            "Allowed are numbers, strings, bools, None, paths, and lists and dicts of them; turn others into "
            "one of these, with str() say"
        )
    return plain


def _plain(values: Mapping[Any, Any], above: str, refused: list[str]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in values.items():
        found = _plain_value(value, f"{above}{name}", refused)
        if found is not _MISSING:
            plain[str(name)] = found
    return plain


def _plain_value(value: Any, where: str, refused: list[str]) -> Any:
    """One value of a configuration; `_MISSING` if it, or an item of a list, is no plain one."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else _number_of(value)
    if isinstance(value, Mapping):
        return _plain(value, f"{where}/", refused)
    if isinstance(value, list | tuple):
        items = [_plain_value(item, f"{where}/{place}", refused) for place, item in enumerate(value)]
        return _MISSING if any(item is _MISSING for item in items) else items
    if _is_plain(value):
        return value
    refused.append(f"{where} ({type(value).__module__}.{type(value).__qualname__})")
    return _MISSING


def joined(values: Mapping[str, Any], *, between: str = "/") -> dict[str, Any]:
    """Nested values by joined names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            inner = joined(value, between=between)
            found.update((f"{name}{between}{key}", item) for key, item in inner.items())
        else:
            found[name] = value
    return found


def texts(values: Mapping[str, Any], *, between: str = "/") -> dict[str, bool | int | float | str]:
    """A configuration by joined names, lists as JSON and None as "None": for trackers that take no more."""
    return {
        name: json.dumps(value) if isinstance(value, list) else "None" if value is None else value
        for name, value in joined(values, between=between).items()
    }


def check_config(values: Any) -> None:
    """Refuse what is no configuration.

    Raises:
        UsageError: saying what it is.
    """
    if values is not None and not isinstance(values, Mapping):
        raise UsageError(
            f"init_trackers(config=...) takes a mapping of names to values; it was given {_shown(values)}. "
            "For argparse, pass vars(args)"
        )


def _shown(value: Any) -> str:
    return f"{value!r:.100} ({type(value).__name__})"
