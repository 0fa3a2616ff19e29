"""A search space: nested dicts, lists and tuples that hold variables: where they are, what lies around."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from keepstep.errors import UsageError
from keepstep.tune.search.sample import Categorical, Domain

__all__ = [
    "Path",
    "completed",
    "copied",
    "flat",
    "grid_search",
    "shown",
    "value_at",
    "variable",
    "variables",
    "with_value",
]

Path = tuple[Any, ...]
"""Keys of dicts and positions in lists, from the outside in."""

_GRID = "grid_search"
_CONTAINERS = (dict, list, tuple)


def grid_search(values: Iterable[Any]) -> dict[str, list[Any]]:
    """Every one of these values is tried, with every one of the other grids'.

    Args:
        values: they may hold variables themselves.

    Returns:
        {"grid_search": [...]}, which may be written by hand as well.

    Raises:
        UsageError: there are none, or they have no order.
    """
    return {_GRID: list(Categorical(values).categories)}  # type: ignore[arg-type]  # it says what it takes


def variable(value: Any) -> Domain | None:
    """The variable that a value of a search space is; None: it is no variable.

    Raises:
        UsageError: it is one that keepstep does not have: {"eval": "..."}.
    """
    if isinstance(value, Domain):
        return value
    if isinstance(value, dict) and len(value) == 1:
        if _GRID in value:
            return Categorical(value[_GRID]).grid()
        if isinstance(value.get("eval"), str):
            raise UsageError(
                f"the search space holds {value!r}; text is not run as code. Use "
                f"sample_from(lambda spec: {value['eval']}); if it is a constant, give its key another name"
            )
    return None


def _children(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def variables(space: Any, path: Path = ()) -> Iterator[tuple[Path, Domain]]:
    """All variables of a search space, outermost first, each with its path; grids are `Categorical`."""
    found = variable(space)
    if found is not None:
        yield path, found
        return
    for key, value in _children(space):
        if isinstance(value, Domain | dict | list | tuple):
            yield from variables(value, (*path, key))


def shown(path: Path) -> str:
    """A path as people write it: "layers/0/width"."""
    return "/".join(map(str, path))


def value_at(space: Any, path: Path) -> Any:
    """What lies there.

    Raises:
        LookupError: nothing does.
    """
    for key in path:
        if variable(space) is not None or not isinstance(space, _CONTAINERS):
            raise LookupError(shown(path))
        space = space[key]
    return space


def _put(container: Any, children: Mapping[Any, Any]) -> Any:
    """A container like this one, with other children."""
    if isinstance(container, tuple):
        whole = [children.get(at, value) for at, value in enumerate(container)]
        make = getattr(type(container), "_make", type(container))  # named ones take their fields one by one
        return make(whole)
    changed = copy.copy(container)
    for key, value in children.items():
        changed[key] = value
    return changed


def copied(space: Any) -> Any:
    """The same containers anew, so that nobody changes another's; what they hold is shared."""
    if not isinstance(space, _CONTAINERS):
        return space
    return _put(space, {key: copied(value) for key, value in _children(space)})


def with_value(space: Any, path: Path, value: Any) -> Any:
    """A space in which something else lies at a path; only what lies around it is made anew."""
    if not path:
        return value
    return _put(space, {path[0]: with_value(space[path[0]], path[1:], value)})


def flat(config: Any, path: Path = ()) -> dict[str, Any]:
    """The leaves of nested dicts by their paths: {"layer": {"width": 3}} gives {"layer/width": 3}."""
    if isinstance(config, dict) and config:
        leaves: dict[str, Any] = {}
        for key, value in config.items():
            leaves.update(flat(value, (*path, key)))
        return leaves
    return {shown(path): config} if path else {}


def completed(param_space: Mapping[str, Any], suggestion: Mapping[str, Any], *, by: str) -> dict[str, Any]:
    """A suggestion together with what `param_space` has besides.

    Args:
        param_space: what the suggestion says is replaced, dicts in dicts too.
        suggestion: what a searcher suggested.
        by: the searcher's name, for errors.

    Raises:
        UsageError: a variable of `param_space` is left without a value.
    """
    config: dict[str, Any] = _merged(param_space, suggestion)
    for path, domain in variables(config):
        raise UsageError(
            f"param_space has a variable at {shown(path)!r} ({domain.domain_str:.100}), and {by} suggests no "
            "value for it, since it has a space of its own; say the space in one place"
        )
    return config


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(below, Mapping) or not isinstance(above, Mapping) or variable(below) is not None:
        return copied(above)
    merged = {key: copied(value) for key, value in below.items() if key not in above}
    ordered = {key: merged[key] if key in merged else _merged(below[key], above[key]) for key in below}
    return {**ordered, **{key: copied(value) for key, value in above.items() if key not in below}}
