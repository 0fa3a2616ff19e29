"""What is said of a checkpoint beside its state: by the user, and by the run that it belongs to. No torch."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keepstep.errors import UsageError

__all__ = ["Description", "Lineage", "describe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What the user says of a checkpoint."""

    step: int | None = None
    epoch: int | None = None
    metrics: Mapping[str, float | int | str | bool]
    tags: tuple[str, ...] = ()
    pinned: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lineage:
    """Which run writes, the how-manieth process of it, and after which checkpoint."""

    run: str
    attempt: int = 1
    parent: str | None = None


def describe(
    *,
    step: int | None,
    epoch: int | None,
    metrics: Mapping[str, Any] | None,
    tags: Sequence[str],
    pinned: bool,
    environment: Mapping[str, Any] | None = None,
) -> Description:
    """Check what the user says of a checkpoint.

    Raises:
        UsageError: naming the argument, its value and what is allowed.
    """
    counts: list[tuple[str, object]] = [("step", step), ("epoch", epoch)]
    for name, value in counts:
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise UsageError(f"{name} is {value!r}; expected a whole number or None")
    given_tags = (tags,) if isinstance(tags, str) else tuple(tags)
    if not all(isinstance(tag, str) and tag for tag in given_tags):
        raise UsageError(f"tags is {tags!r}; expected non-empty strings")
    if metrics is not None and not isinstance(metrics, Mapping):
        raise UsageError(f'metrics is {metrics!r:.100}; expected names with values, as {{"loss": 0.5}}')
    if pinned not in (True, False):
        raise UsageError(f"pinned is {pinned!r:.100}; expected True or False")
    return Description(
        step=None if step is None else int(step),
        epoch=None if epoch is None else int(epoch),
        metrics={_metric_name(name): _metric(name, value) for name, value in (metrics or {}).items()},
        tags=given_tags,
        pinned=bool(pinned),
        environment=_environment(environment or {}),
    )


def _environment(given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of its own, of what JSON can hold.

    Raises:
        UsageError: it can't.
    """
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(given), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"environment is {given!r:.200}; expected names with what JSON can hold ({error})"
        ) from None
    return copied


def _metric_name(name: object) -> str:
    if not isinstance(name, str):
        raise UsageError(f"a metric's name is {name!r}; expected a string")
    return name


def _metric(name: str, value: Any) -> float | int | str | bool:
    if hasattr(value, "shape") and hasattr(value, "item"):  # a tensor, array or scalar of NumPy's
        if math.prod(value.shape) != 1:
            raise UsageError(f"metric {name!r} has the shape {tuple(value.shape)}; expected one number")
        value = value.item()
    if not isinstance(value, float | int | str | bool):
        raise UsageError(
            f"metric {name!r} is {value!r:.100}, a {type(value).__name__}; expected a number or string"
        )
    return value
