"""What a trial reports, as plain values that JSON holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.result import DEFAULT_METRIC

__all__ = ["as_metrics", "plain_metrics"]

_AS_THEY_ARE: Final = (float, int, str, bool, type(None))
_MISSING: Final = object()


def as_metrics(said: Any, by: str) -> Mapping[str, Any]:
    """What a trial said, as a mapping: a bare number is the metric "_metric".

    Args:
        said: a mapping of names to values, or a number.
        by: who said it, for messages ("tune.report()").

    Raises:
        UsageError: it is neither.
    """
    if isinstance(said, Mapping):
        for name in said:
            if not isinstance(name, str):
                raise UsageError(
                    f"{by} was given the name {name!r} ({type(name).__name__}); names of metrics are "
                    f"strings: {str(name)!r}"
                )
        return said
    number = _plain(said)
    if number is None or isinstance(number, str | list | dict) or number is _MISSING:
        raise UsageError(
            f'{by} takes a mapping of names to values, as {{"loss": 0.5}}, or a single number; it was given '
            f"{said!r:.100} ({type(said).__name__})"
        )
    return {DEFAULT_METRIC: number}


def plain_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split metrics into what JSON holds (NaN and infinities included), and the kinds of the others.

    Numbers of NumPy and tensors of one element become Python's; tuples become lists.

    Returns:
        The values, and {name, nested ones joined by "/": kind of value} of what was left out.
    """
    kept: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in metrics.items():
        if type(value) in _AS_THEY_ARE:
            kept[name] = value
        elif isinstance(value, Mapping):
            kept[name], inner = plain_metrics({str(key): item for key, item in value.items()})
            left_out.update((f"{name}/{key}", kind) for key, kind in inner.items())
        elif (plain := _plain(value)) is not _MISSING:
            kept[name] = plain
        else:
            left_out[name] = f"{type(value).__module__}.{type(value).__qualname__}"
    return kept, left_out


def _plain(value: Any) -> Any:
    """A number, text, None or list of these; `_MISSING` for anything else."""
    if type(value) in _AS_THEY_ARE:
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # an enumeration, a NumPy float64
            return kind(value)
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _MISSING if any(item is _MISSING for item in items) else items
    if isinstance(value, Mapping):
        kept, left_out = plain_metrics({str(key): item for key, item in value.items()})
        return _MISSING if left_out else kept
    count = getattr(value, "numel", None)
    count = count() if callable(count) else getattr(value, "size", None)
    if count == 1 and callable(getattr(value, "item", None)):
        item = value.item()
        return item if type(item) in _AS_THEY_ARE else _MISSING
    return _MISSING
