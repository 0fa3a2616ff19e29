"""The process's environment, changed for the length of a block, by scripts that ask for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from keepstep.errors import UsageError

__all__ = [
    "clear_environment",
    "get_int_from_env",
    "parse_choice_from_env",
    "parse_flag_from_env",
    "patch_environment",
    "str_to_bool",
]

_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


@contextmanager
def clear_environment() -> Iterator[None]:
    """Run a block without any environment variables; afterwards all are as before."""
    before = dict(os.environ)
    os.environ.clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def patch_environment(**kwargs: Any) -> Iterator[None]:
    """Set environment variables for a block; afterwards those are as before.

    Args:
        kwargs: names, which are put in upper case, and values, which are made strings.
    """
    names = {name.upper(): str(value) for name, value in kwargs.items()}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def str_to_bool(value: str, to_bool: bool = False) -> int | bool:
    """Read a yes or no: y, yes, t, true, on, 1 or n, no, f, false, off, 0, in any case.

    Args:
        value: the text.
        to_bool: return True or False instead of 1 or 0.

    Raises:
        UsageError: another text.
    """
    text = value.lower()
    if text not in _TRUE + _FALSE:
        raise UsageError(f"{value!r} is neither yes nor no; allowed: {', '.join(_TRUE + _FALSE)}")
    return (text in _TRUE) if to_bool else int(text in _TRUE)


def parse_flag_from_env(key: str, default: bool = False) -> bool:
    """Whether an environment variable says yes; `default` if it is not set."""
    return bool(str_to_bool(os.environ.get(key, str(default))))


def parse_choice_from_env(key: str, default: str = "no") -> str:
    """An environment variable; `default` if it is not set."""
    return os.environ.get(key, str(default))


def get_int_from_env(env_keys: list[str], default: int) -> int:
    """The first of several environment variables that is set to a number of at least 0, or `default`."""
    for key in env_keys:
        number = int(os.environ.get(key, "-1"))
        if number >= 0:
            return number
    return default
