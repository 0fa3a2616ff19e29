"""A search space, and other arguments, as JSON: to be read by people, compared, and made anew.

What JSON holds stands as it is. Everything else is a dict with the key "$": variables ("choice", ...),
tuples, dicts whose keys are no text, numbers that are not finite; searchers, schedulers and stoppers of
keepstep's own ("part"); and what can't be described ("object"), functions above all: that has to be handed
over again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from keepstep.errors import UsageError
from keepstep.tune.search.sample import Categorical, Domain, Float, Function, Integer
from keepstep.tune.search.space import shown

__all__ = ["described", "differences", "revived", "undescribed"]

_KIND: Final = "$"
_OURS: Final = "keepstep.tune."


def described(value: Any) -> Any:
    """A nested value as JSON, from which the same comes back; a number of numpy comes back as a plain one.

    Args:
        value: dicts, lists and tuples of what JSON holds, variables, and anything else, which is marked; so
            are subclasses of these, and arrays.
    """
    kind = type(value)
    if value is None or kind in (bool, str, int):
        return value
    if kind is float:
        return value if math.isfinite(value) else {_KIND: "float", "value": repr(value)}
    if kind is list:
        return [described(item) for item in value]
    if kind is tuple:
        return {_KIND: "tuple", "items": [described(item) for item in value]}
    if kind is dict:
        if all(type(key) is str and key != _KIND for key in value):
            return {key: described(item) for key, item in value.items()}
        return {_KIND: "dict", "items": [[described(key), described(item)] for key, item in value.items()]}
    if isinstance(value, Domain):
        return _described_domain(value)
    if isinstance(value, Path):
        return {_KIND: "path", "value": str(value)}
    if kind.__module__.startswith(_OURS) and callable(getattr(value, "describe", None)):
        return _described_part(value)
    if kind.__module__.partition(".")[0] == "numpy" and getattr(value, "shape", None) == ():
        return described(value.item())
    return _described_object(value)


def _described_domain(domain: Domain) -> dict[str, Any]:
    if isinstance(domain, Categorical):
        return {_KIND: "grid" if domain.is_grid() else "choice", "values": described(list(domain.categories))}
    if isinstance(domain, Float | Integer):
        kind = "float" if isinstance(domain, Float) else "int"
        said: dict[str, Any] = {_KIND: f"{domain.drawn} {kind}"}
        if domain.drawn == "normal" and isinstance(domain, Float):
            said.update(mean=domain.mean, sd=domain.sd)
        else:
            said.update(lower=described(domain.lower), upper=described(domain.upper))
        return said if domain.q is None else {**said, "q": domain.q}
    return _described_object(domain.func if isinstance(domain, Function) else domain)


def _described_part(part: Any) -> dict[str, Any]:
    arguments = part.describe()
    if arguments is None:
        return _described_object(part)
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    return {_KIND: "part", "class": name, "arguments": described(arguments)}


def _described_object(value: Any) -> dict[str, Any]:
    name = getattr(value, "__qualname__", None)
    what = value if name is not None else type(value)
    said = {_KIND: "object", "type": f"{type(value).__module__}.{type(value).__qualname__}"}
    module = getattr(what, "__module__", None) or "builtins"
    return {**said, "name": f"{module}.{what.__qualname__}"} if name is not None else said


def undescribed(description: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, str]]:
    """What a description can't make anew: where it stands ("opt/schedule"), and what it is."""
    if isinstance(description, dict):
        kind = description.get(_KIND)
        if kind == "object":
            yield shown(path), str(description.get("name", description["type"]))
        elif kind == "dict":
            for key, item in description["items"]:
                yield from undescribed(item, (*path, key))
        elif kind == "part":
            yield from undescribed(description["arguments"], path)
        elif kind is not None:
            for item in description.values():
                yield from undescribed(item, path)
        else:
            for key, item in description.items():
                yield from undescribed(item, (*path, key))
    elif isinstance(description, list):
        for at, item in enumerate(description):
            yield from undescribed(item, (*path, at))


_DOMAINS: Final[Mapping[str, Callable[[Mapping[str, Any]], Domain]]] = {
    "choice": lambda said: Categorical(revived(said["values"])),
    "grid": lambda said: Categorical(revived(said["values"])).grid(),
    "uniform float": lambda said: Float(revived(said["lower"]), revived(said["upper"]), q=said.get("q")),
    "loguniform float": lambda said: Float(said["lower"], said["upper"], "loguniform", q=said.get("q")),
    "normal float": lambda said: Float(
        drawn="normal", mean=float(said["mean"]), sd=float(said["sd"]), q=said.get("q")
    ),
    "uniform int": lambda said: Integer(said["lower"], said["upper"], q=said.get("q")),
    "loguniform int": lambda said: Integer(said["lower"], said["upper"], "loguniform", q=said.get("q")),
}


def revived(description: Any, *, argument: str = "param_space") -> Any:
    """What was described, anew.

    Args:
        description: what `described` gave.
        argument: by what name it is handed over, for errors.

    Raises:
        UsageError: it holds what can't be made anew; each place is named.
    """
    lost = list(undescribed(description))
    if lost:
        places = "; ".join(f"{where!r} ({what})" if where else what for where, what in lost[:10])
        raise UsageError(
            f"{argument} holds what is not kept with the experiment: {places}. Functions and objects are "
            f"never pickled: hand over {argument} again, as it was"
        )
    return _revived(description)


def _revived(said: Any) -> Any:
    if isinstance(said, list):
        return [_revived(item) for item in said]
    if not isinstance(said, dict):
        return said
    kind = said.get(_KIND)
    if kind is None:
        return {key: _revived(item) for key, item in said.items()}
    if kind == "tuple":
        return tuple(_revived(item) for item in said["items"])
    if kind == "dict":
        return {_revived(key): _revived(item) for key, item in said["items"]}
    if kind == "float":
        return float(said["value"])
    if kind == "path":
        return Path(said["value"])
    if kind == "part":
        return _revived_part(said)
    if kind in _DOMAINS:
        return _DOMAINS[kind](said)
    raise UsageError(
        f"a description holds {said!r:.200}; this keepstep knows no {kind!r}. A newer one wrote it"
    )


def _revived_part(said: Mapping[str, Any]) -> Any:
    """A searcher, scheduler or stopper of keepstep's own; no other class is looked up."""
    module, _, name = str(said["class"]).rpartition(".")
    found = getattr(import_module(module), name, None) if module.startswith(_OURS) else None
    if not (isinstance(found, type) and callable(getattr(found, "describe", None))):
        raise UsageError(f"a description names {said['class']!r}, which this keepstep does not have")
    arguments = dict(_revived(said["arguments"]))
    return found(*arguments.pop("*", ()), **arguments)


def differences(old: Any, new: Any) -> list[str]:
    """What distinguishes two descriptions, each in words: "lr: uniform float 0 to 1 was, 0.1 is".

    Objects count as the same if they are of one type and name: what they hold can't be told.

    Returns:
        One entry a place; []: they describe the same.
    """
    return list(_differences(old, new, ()))


def _differences(old: Any, new: Any, path: tuple[Any, ...]) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict) and _KIND not in old and _KIND not in new:
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in old:
                yield f"{shown((*path, key))}: is new ({_words(new[key])})"
            elif key not in new:
                yield f"{shown((*path, key))}: was {_words(old[key])} and is gone"
            else:
                yield from _differences(old[key], new[key], (*path, key))
    elif _same_class(old, new):
        yield from _differences(old["arguments"], new["arguments"], path)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for at, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, (*path, at))
    elif type(old) is not type(new) or old != new:
        yield f"{shown(path) or 'it'}: was {_words(old)} and is {_words(new)}"


def _same_class(old: Any, new: Any) -> bool:
    parts = [said for said in (old, new) if isinstance(said, dict) and said.get(_KIND) == "part"]
    return len(parts) == 2 and old["class"] == new["class"]


def _words(said: Any) -> str:
    if isinstance(said, dict) and _KIND in said:
        kind = said[_KIND]
        if kind == "object":
            return str(said.get("name", said["type"]))
        if kind == "part":
            return f"{said['class'].rpartition('.')[2]} {_words(said['arguments'])}"
        return f"{kind} {', '.join(f'{key}={_words(item)}' for key, item in said.items() if key != _KIND)}"
    return f"{said!r:.200}"
