"""From a search space to configurations: grids are walked through, variables drawn, functions called.

What is drawn may hold variables again (a choice of dicts): they are drawn after it, until there are none.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

from keepstep.errors import UsageError
from keepstep.tune.search.sample import Categorical, Domain, Function
from keepstep.tune.search.space import Path, copied, flat, shown, value_at, variable, variables, with_value

__all__ = ["Draw", "Variant", "count", "sampling", "variants"]

Draw = Callable[[Path, Domain, Any], Any]
"""Gives the value of a variable, from its path, itself, and the space as far as it is resolved."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One configuration of a search space.

    Attributes:
        config: complete.
        evaluated: what of it was drawn or picked, by path: {"layer/width": 3}.
    """

    config: Any
    evaluated: dict[str, Any]


def variants(space: Any, draw: Draw, *, constant_grid_search: bool = False) -> Iterator[Variant]:
    """All combinations of the grids of a space, one after the other, each with its variables drawn.

    Grids are ordered by their paths; the first changes fastest, as in `ray.tune`.

    Args:
        space: nested; not changed.
        draw: gives the values of variables that are not grids.
        constant_grid_search: draw variables once, and keep them for the whole grid.

    Yields:
        One variant at a time; nothing is drawn ahead.

    Raises:
        UsageError: functions wait for each other's values.
    """
    for config, paths in _resolved(space, draw, constant_grid_search):
        evaluated: dict[str, Any] = {}
        for path in paths:
            value = value_at(config, path)
            evaluated.update(flat(value, path) if isinstance(value, dict) else {shown(path): value})
        yield Variant(config, evaluated)


def _resolved(space: Any, draw: Draw, constant: bool) -> Iterator[tuple[Any, list[Path]]]:
    found = list(variables(space))
    if not found:
        yield copied(space), []
        return
    grids = sorted(((path, domain) for path, domain in found if domain.is_grid()), key=_order)
    others = [(path, domain) for path, domain in found if not domain.is_grid()]
    kept: set[Path] = set()
    if constant:
        space, kept = _drawn(space, others, draw)
        others = [(path, domain) for path, domain in others if path not in kept]
    for values in _combinations([domain for _, domain in grids]):
        config = space
        for (path, _), value in zip(grids, values, strict=True):
            config = with_value(config, path, value)
        config, now = _drawn(config, others, draw)
        if not (grids or kept or now):
            raise UsageError(
                f"variables of the search space wait for each other's values: "
                f"{', '.join(repr(shown(path)) for path, _ in others)}. A function of sample_from may read "
                "others that do not, in the end, read its own"
            )
        for whole, more in _resolved(config, draw, constant):
            yield whole, list(dict.fromkeys([*(path for path, _ in found), *more]))


def _order(item: tuple[Path, Domain]) -> list[tuple[str, Any]]:
    return [("", key) if isinstance(key, int) else (type(key).__name__, str(key)) for key in item[0]]


def _combinations(grids: Sequence[Domain]) -> Iterator[tuple[Any, ...]]:
    lists = [grid.categories for grid in grids if isinstance(grid, Categorical)]
    for values in product(*reversed(lists)):
        yield values[::-1]


def _drawn(space: Any, waiting: Sequence[tuple[Path, Domain]], draw: Draw) -> tuple[Any, set[Path]]:
    """The space with values drawn, and which were; functions that read what is not there yet stay."""
    done: set[Path] = set()
    progress = True
    while progress:
        progress = False
        for path, domain in waiting:
            if path in done:
                continue
            try:
                value = draw(path, domain, space)
            except _NotYetError:
                continue
            space = with_value(space, path, value)
            done.add(path)
            progress = True
    return space, done


def count(space: Any) -> int | None:
    """How many variants a space has; None: that depends on what is drawn."""
    total = 1
    for _, domain in variables(space):
        if isinstance(domain, Categorical):
            each = [count(category) for category in domain.categories]
            known = [number for number in each if number is not None]
            if len(known) < len(each) or (not domain.is_grid() and len(set(known)) > 1):
                return None
            total *= sum(known) if domain.is_grid() else known[0]
    return total


# ---------------------------------------------------------------------- drawing, and calling functions


def sampling(generator: random.Random) -> Draw:
    """Draws every variable from its own distribution."""

    def draw(path: Path, domain: Domain, space: Any) -> Any:
        if isinstance(domain, Function):
            return called(domain, path, space, generator)
        return domain.sample(random_state=generator)

    return draw


def called(function: Function, path: Path, space: Any, generator: random.Random) -> Any:
    """What a function of `sample_from` gives.

    Args:
        function: it.
        path: where it stands, for errors.
        space: as far as it is resolved.
        generator: what the function draws from `random` and `numpy.random` comes from here.

    Raises:
        UsageError: it raised.
    """
    with _global_generators(generator.getrandbits(32)):
        try:
            return _unwrapped(function.sample(_Spec(space)))
        except (_NotYetError, UsageError):
            raise
        except Exception as error:
            there = (
                f"; the configuration has: {', '.join(map(str, space))}" if isinstance(space, dict) else ""
            )
            raise UsageError(
                f"the function of sample_from at {shown(path)!r} raised {type(error).__name__}: {error}"
                f"{there}"
            ) from error


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """A user's function that draws from `random` or `numpy.random` draws the same after a restart."""
    state = random.getstate()
    numpy_random: Any = sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state() if numpy_random else None
    random.seed(seed)
    if numpy_random:
        numpy_random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


class _NotYetError(Exception):
    """A function read a variable that has no value yet."""


class _View(Mapping[Any, Any]):
    """A configuration as a function of `sample_from` reads it: by key and by attribute."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getitem__(self, key: Any) -> Any:
        value = self._inner[key]
        if variable(value) is not None:
            raise _NotYetError
        if isinstance(value, dict):
            return _View(value)
        if isinstance(value, list | tuple) and any(True for _ in variables(value)):
            raise _NotYetError
        return value

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r}") from None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)

    def __repr__(self) -> str:
        return repr(self._inner)


class _Spec(_View):
    """The same, with the whole once more as `config`, as `ray.tune` hands it over."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        return _View(self._inner) if key == "config" else super().__getitem__(key)


def _unwrapped(value: Any) -> Any:
    return {key: _unwrapped(inner) for key, inner in value.items()} if isinstance(value, _View) else value
