"""Trainables by name."""

from __future__ import annotations

import functools
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.trainable.kinds import check_trainable, is_class_trainable

__all__ = ["get_trainable_cls", "named_trainable", "register_trainable"]

_registered: Final[dict[str, Any]] = {}


def register_trainable(name: str, trainable: Any, warn: bool = True) -> None:
    """Let a function or class be given to `Tuner` and `tune.run` by a name, which its trials have, too.

    It holds in this process; a name that is taken is given to the new one.

    Args:
        name: letters, digits and what a directory's name may have besides.
        trainable: as `Tuner` takes it.
        warn: there is nothing to warn of; a script written for Ray Tune may say it.

    Raises:
        UsageError: it is no name, or no trainable.
    """
    del warn
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise UsageError(
            f"register_trainable was given the name {name!r}; expected one that a directory could have"
        )
    check_trainable(trainable, "register_trainable", complete=False)
    _registered[name] = _called(name, trainable)


def _called(name: str, trainable: Any) -> Any:
    """The same, by this name."""
    if is_class_trainable(trainable):
        return type(name, (trainable,), {"__module__": trainable.__module__, "__doc__": trainable.__doc__})
    wrapped = functools.partial(trainable)
    vars(wrapped)["__name__"] = name
    return wrapped


def get_trainable_cls(trainable_name: str) -> Any:
    """The function or class that was registered by a name.

    Raises:
        UsageError: none was.
    """
    if trainable_name not in _registered:
        known = ", ".join(map(repr, sorted(_registered))) or "none"
        raise UsageError(
            f"no trainable is registered by the name {trainable_name!r}; there are: {known}. Register it by "
            "tune.register_trainable(name, trainable), or hand over the function or class itself"
        )
    return _registered[trainable_name]


def named_trainable(said: Any) -> Any:
    """What a name stands for; a trainable stands for itself.

    Raises:
        UsageError: nothing was registered by that name.
    """
    return get_trainable_cls(said) if isinstance(said, str) else said
