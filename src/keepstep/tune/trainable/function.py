"""A function as a trial: it reports, and may return a last result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["call_function"]


def call_function(
    function: Callable[..., Any], config: dict[str, Any], report: Callable[[Any, str], None]
) -> None:
    """Run a function trainable to its end.

    What it yields are reports; what it returns, unless None or {}, is the last one.

    Args:
        function: the trainable.
        config: its argument.
        report: called with each result and who says it; raises what is to unwind the function.

    Raises:
        UsageError: what it returned is no result.
    """
    returned = function(config)
    if inspect.isgenerator(returned):
        try:
            for said in returned:
                _told(said, "yield", report)
        finally:
            returned.close()
        return
    _told(returned, "the function's return", report)


def _told(said: Any, by: str, report: Callable[[Any, str], None]) -> None:
    if said is not None and not (isinstance(said, Mapping) and not said):
        report(said, by)
