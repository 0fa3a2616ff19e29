"""What a search space is written with: `uniform`, `choice`, ...: names and meanings of `ray.tune`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keepstep.errors import UsageError
from keepstep.tune.search.domain import Categorical, Domain, Float, Function, Integer, whole

__all__ = [
    "Categorical",
    "Domain",
    "Float",
    "Function",
    "Integer",
    "choice",
    "lograndint",
    "loguniform",
    "qlograndint",
    "qloguniform",
    "qrandint",
    "qrandn",
    "quniform",
    "randint",
    "randn",
    "sample_from",
    "uniform",
]


def uniform(lower: float, upper: float) -> Float:
    """A number drawn evenly: `lower` <= x < `upper`.

    Raises:
        UsageError: a bound is no finite number, or `lower` is above `upper`.
    """
    return Float(lower, upper).uniform()


def quniform(lower: float, upper: float, q: float) -> Float:
    """A multiple of `q` drawn evenly: `lower` <= x <= `upper`; both ends are half as likely as the others.

    Raises:
        UsageError: as for `uniform`, or a bound is no multiple of `q`.
    """
    return Float(lower, upper).uniform().quantized(q)


def loguniform(lower: float, upper: float, base: float = 10) -> Float:
    """A number whose logarithm is drawn evenly: 0 < `lower` <= x < `upper`. For learning rates and the like.

    Args:
        lower: the least, > 0.
        upper: what it stays below.
        base: of the logarithm; with any, the same numbers are drawn.

    Raises:
        UsageError: a bound is no finite number > 0, `lower` is above `upper`, or there is no such base.
    """
    _check_base(base)
    return Float(lower, upper).loguniform()


def qloguniform(lower: float, upper: float, q: float, base: float = 10) -> Float:
    """The multiple of `q` nearest to a number drawn as by `loguniform`: `lower` <= x <= `upper`.

    Raises:
        UsageError: as for `loguniform`, or a bound is no multiple of `q`.
    """
    _check_base(base)
    return Float(lower, upper).loguniform().quantized(q)


def randn(mean: float = 0.0, sd: float = 1.0) -> Float:
    """A number drawn from a normal distribution.

    Args:
        mean: its mean.
        sd: its standard deviation, > 0.
    """
    return Float().normal(mean, sd)


def qrandn(mean: float, sd: float, q: float) -> Float:
    """The multiple of `q` nearest to a number drawn as by `randn`."""
    return Float().normal(mean, sd).quantized(q)


def randint(lower: int, upper: int) -> Integer:
    """A whole number drawn evenly: `lower` <= x < `upper`.

    Raises:
        UsageError: a bound is no whole number, or `upper` is not above `lower`.
    """
    return Integer(lower, upper).uniform()


def qrandint(lower: int, upper: int, q: int = 1) -> Integer:
    """A multiple of `q` drawn evenly: `lower` <= x <= `upper`; with `q=1`: x < `upper`.

    Raises:
        UsageError: as for `randint`, or there is no multiple of `q` between the bounds.
    """
    return Integer(lower, upper, q=whole(q, "q", "qrandint")).uniform().quantized(q)


def lograndint(lower: int, upper: int, base: float = 10) -> Integer:
    """A whole number whose logarithm is drawn evenly: 0 < `lower` <= x < `upper`; `base` as for `loguniform`.

    Raises:
        UsageError: a bound is no whole number > 0, `upper` is not above `lower`, or there is no such base.
    """
    _check_base(base)
    return Integer(lower, upper).loguniform()


def qlograndint(lower: int, upper: int, q: int, base: float = 10) -> Integer:
    """A multiple of `q`, drawn evenly by its logarithm: 0 < `lower` <= x <= `upper`; with `q=1`: x < `upper`.

    Raises:
        UsageError: as for `lograndint`, or there is no multiple of `q` between the bounds.
    """
    _check_base(base)
    return Integer(lower, upper, q=whole(q, "q", "qlograndint")).loguniform().quantized(q)


def choice(categories: Sequence[Any]) -> Categorical:
    """One of these, each as likely as the others. They may hold variables, drawn if they are chosen.

    Raises:
        UsageError: there are none, or they have no order.
    """
    return Categorical(categories).uniform()


def sample_from(func: Callable[..., Any]) -> Function:
    """What a function gives, mostly one of what is drawn for other variables.

    It is called with an object that holds the configuration as far as it is drawn, by key and by attribute:
    `lambda spec: spec.config.width * 2`, `lambda config: config["width"] * 2`. Reading a variable that is not
    drawn yet puts the function off until it is. What it draws from the modules `random` and `numpy.random`
    comes from the experiment's seed.

    Args:
        func: takes that object, or nothing.

    Raises:
        UsageError: it takes more.
    """
    return Function(func)


def _check_base(base: float) -> None:
    if not base > 0 or base == 1:
        raise UsageError(f"base is {base!r}; expected the base of a logarithm: more than 0, and not 1")
