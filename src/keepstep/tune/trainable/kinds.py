"""Functions and classes: which of them a trainable is, what it is called."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from keepstep.errors import UsageError
from keepstep.tune.trainable.trainable import Trainable

__all__ = ["check_trainable", "is_class_trainable", "saves_checkpoints", "trainable_name"]


def is_class_trainable(trainable: Any) -> bool:
    """Whether it is a class with the methods of `Trainable`."""
    return inspect.isclass(trainable) and issubclass(trainable, Trainable)


def check_trainable(trainable: Any, to: str = "Tuner", *, complete: bool = True) -> None:
    """Refuse what can't be a trial.

    Args:
        trainable: the function or class.
        to: who was given it, for messages.
        complete: whether a configuration must be all that it is called with; False: more is filled in later.

    Raises:
        UsageError: it is no function and no subclass of `Trainable`, or takes other arguments.
    """
    if is_class_trainable(trainable):
        return
    if inspect.isclass(trainable) or not callable(trainable):
        what = "the class" if inspect.isclass(trainable) else f"a {type(trainable).__name__},"
        raise UsageError(
            f"{to} was given {what} {trainable!r:.100} as a trainable; expected a function of one argument, "
            "the configuration, or a subclass of keepstep.tune.Trainable"
        )
    if complete:
        _check_signature(trainable)


def _check_signature(function: Any) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in: it says nothing of its arguments
        return
    try:
        signature.bind({})
    except TypeError as error:
        raise UsageError(
            f"The trainable {trainable_name(function)}{signature} can't be called with a configuration alone "
            f"({error}); give it one argument, the configuration. tune.with_parameters() fills in others"
        ) from None


def trainable_name(trainable: Any) -> str:
    """What a trainable is called, in names of experiments and trials."""
    while isinstance(trainable, functools.partial) and "__name__" not in vars(trainable):  # a registered one
        trainable = trainable.func
    name = getattr(trainable, "__name__", None) or type(trainable).__name__
    return "lambda" if name == "<lambda>" else str(name)


def saves_checkpoints(trainable: Any) -> bool:
    """Whether it is a class with a `save_checkpoint` of its own."""
    return is_class_trainable(trainable) and trainable.save_checkpoint is not Trainable.save_checkpoint
