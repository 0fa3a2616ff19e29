"""What a trial holds while it runs: `with_resources`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.trainable.bundles import PlacementGroupFactory, resource_dict_to_pg_factory
from keepstep.tune.trainable.kinds import check_trainable, is_class_trainable
from keepstep.tune.trainable.trainable import Trainable

__all__ = ["asks_alike", "bundles_of", "resources_of", "with_resources"]

_NAMES: Final = {"CPU": "cpu", "GPU": "gpu"}
_ATTRIBUTE: Final = "_tune_resources"


def with_resources(
    trainable: Any, resources: Mapping[str, float] | PlacementGroupFactory | Callable[..., Any]
) -> Any:
    """A trainable that says what each of its trials holds while it runs.

    Args:
        trainable: a function or a class.
        resources: {"cpu": 2, "gpu": 0.5} (what isn't named is 0), bundles, or a function of a trial's
            configuration that returns either.

    Returns:
        A trainable for `Tuner`; the one given stays as it was.

    Raises:
        UsageError: it is no trainable, or these are no resources.
    """
    check_trainable(trainable, "tune.with_resources()", complete=False)
    said: Any = resources
    if isinstance(resources, Mapping):
        said = resource_dict_to_pg_factory(resources)
    elif not isinstance(resources, PlacementGroupFactory) and not callable(resources):
        raise UsageError(
            f"tune.with_resources() was given resources={resources!r} ({type(resources).__name__}); expected "
            'a dict as {"cpu": 2, "gpu": 0.5}, a PlacementGroupFactory, or a function of the configuration'
        )
    if is_class_trainable(trainable):
        told = {_ATTRIBUTE: staticmethod(said) if not isinstance(said, PlacementGroupFactory) else said}
        told |= {"__module__": trainable.__module__, "__doc__": trainable.__doc__}
        return type(trainable.__name__, (trainable,), told)
    wrapped = functools.partial(trainable)
    vars(wrapped)[_ATTRIBUTE] = said
    return wrapped


def resources_of(trainable: Any, config: dict[str, Any]) -> dict[str, float]:
    """What a trial with this configuration holds while it runs: {"cpu": 1.0, "gpu": 0.5, ...}.

    Without a word from `with_resources` or `Trainable.default_resource_request`: one CPU.

    Raises:
        UsageError: what was said are no resources.
    """
    return {
        _NAMES.get(name, name): amount
        for name, amount in bundles_of(trainable, config).required_resources.items()
    }


def asks_alike(trainable: Any) -> bool:
    """Whether all trials hold the same, whatever their configurations are."""
    said = _said(trainable)
    if said is not None:
        return isinstance(said, PlacementGroupFactory | Mapping)
    if not is_class_trainable(trainable):
        return True
    says = (kind for kind in trainable.__mro__ if "default_resource_request" in vars(kind))
    return next(says, None) is Trainable


def bundles_of(trainable: Any, config: dict[str, Any]) -> PlacementGroupFactory:
    """The same in bundles, as a cluster takes it."""
    said = _said(trainable)
    if said is None and is_class_trainable(trainable):
        said = trainable.default_resource_request
    if said is not None and not isinstance(said, PlacementGroupFactory | Mapping):
        said = said(config)
    if said is None or isinstance(said, Mapping):
        return resource_dict_to_pg_factory(said)
    if not isinstance(said, PlacementGroupFactory):
        raise UsageError(
            f"The resources of a trial are {said!r} ({type(said).__name__}); expected a dict as "
            '{"cpu": 2, "gpu": 0.5} or a PlacementGroupFactory'
        )
    return said


def _said(trainable: Any) -> Any:
    while True:
        if (said := getattr(trainable, _ATTRIBUTE, None)) is not None:
            return said
        if not isinstance(trainable, functools.partial):
            return None
        trainable = trainable.func
