"""Values of settings, checked; every message names the setting, the value and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from keepstep.errors import UsageError

__all__ = ["MixedPrecision", "as_bool", "as_gpu_ids", "as_int", "as_port", "one_of"]

MixedPrecision = Literal["no", "fp16", "bf16", "fp8"]

_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_LAST_PORT = 65535


def as_int(name: str, value: Any, *, least: int) -> int:
    """An integer of at least `least`.

    Raises:
        UsageError: it is none.
    """
    text = str(value)
    if isinstance(value, bool) or not text.isdecimal() or int(text) < least:
        raise UsageError(f"{name} is {value!r}; expected an integer of at least {least}.")
    return int(text)


def as_port(name: str, value: Any) -> int:
    """A TCP port; 0 stands for a free one.

    Raises:
        UsageError: it is none.
    """
    port = as_int(name, value, least=0)
    if port > _LAST_PORT:
        raise UsageError(
            f"{name} is {value!r}; expected a port of at most {_LAST_PORT}, or 0 for a free one."
        )
    return port


def as_bool(name: str, value: Any) -> bool:
    """A truth value, also as text.

    Raises:
        UsageError: it is none.
    """
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        raise UsageError(f"{name} is {value!r}; expected true or false.")
    return text in _TRUE


def as_gpu_ids(name: str, value: Any) -> str:
    """GPUs as CUDA_VISIBLE_DEVICES takes them, or "all".

    Raises:
        UsageError: it is neither.
    """
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value).replace(" ", "")
    if text != "all" and not re.fullmatch(r"[\w:-]+(,[\w:-]+)*", text):
        raise UsageError(f'{name} is {value!r}; expected numbers with commas, as "0,1", or "all".')
    return text


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """A value out of a list.

    Raises:
        UsageError: it is not in the list.
    """
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(allowed)}.")
    return value
