"""`with_parameters`: large objects that travel once, not with every trial."""

from __future__ import annotations

import functools
from typing import Any

from keepstep.errors import UsageError
from keepstep.tune.trainable.kinds import check_trainable, is_class_trainable

__all__ = ["with_parameters"]


def with_parameters(trainable: Any, **kwargs: Any) -> Any:
    """A trainable whose function (or `setup`) gets more arguments than the configuration.

    They are shipped with the trainable, once, and trials on one machine share their memory as long as nobody
    writes to it.

    Args:
        trainable: a function, called as `function(config, **kwargs)`, or a class, whose method is called as
            `setup(config, **kwargs)`.
        kwargs: the arguments.

    Returns:
        A trainable for `Tuner`; the one given stays as it was.

    Raises:
        UsageError: it is no trainable.
    """
    check_trainable(trainable, "tune.with_parameters()", complete=False)
    if not is_class_trainable(trainable):
        if "config" in kwargs:
            raise UsageError("tune.with_parameters() was given `config`, which every trial gets by itself")
        return functools.partial(trainable, **kwargs)

    def setup(self: Any, config: dict[str, Any]) -> None:
        trainable.setup(self, config, **kwargs)

    told = {"setup": setup, "__module__": trainable.__module__, "__doc__": trainable.__doc__}
    return type(trainable.__name__, (trainable,), told)
