"""What values a variable of a search space may have, and how one is drawn: names and bounds of `ray.tune`.

A domain is a value: it never changes, and two that say the same are equal. Values are drawn from a
`random.Random` of the caller's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from numbers import Real
from typing import Any, Literal

from keepstep.errors import UsageError

__all__ = ["Categorical", "Domain", "Float", "Function", "Integer", "whole"]

Drawn = Literal["uniform", "loguniform", "normal", "grid"]


def _number(value: object, name: str, call: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise UsageError(f"{call}: {name} is {value!r}; expected a number")
    return float(value)


def whole(value: object, name: str, call: str) -> int:
    """A whole number, of whatever type.

    Raises:
        UsageError: it is none; `name` and `call` say of what.
    """
    number = _number(value, name, call)
    if not math.isfinite(number) or not number.is_integer():
        raise UsageError(f"{call}: {name} is {value!r}; expected a whole number")
    return int(value)  # type: ignore[call-overload,no-any-return]  # exact, where a float is not


def _positive(value: object, name: str, call: str) -> float:
    number = _number(value, name, call)
    if not 0 < number < math.inf:
        raise UsageError(f"{call}: {name} is {value!r}; expected a finite number > 0")
    return number


def _index_on_grid(bound: float, q: float, inwards: Callable[[float], float]) -> float:
    """Which multiple of `q` a bound is, rounded inwards if it is none; infinite ones stay."""
    if not math.isfinite(bound):
        return bound
    scaled = bound / q
    nearest = round(scaled)
    return nearest if math.isclose(scaled, nearest) else inwards(scaled)


def _generator(random_state: random.Random | int | None) -> random.Random:
    return random_state if isinstance(random_state, random.Random) else random.Random(random_state)  # noqa: S311


def _above_zero(lower: float, upper: float, call: str) -> None:
    if not 0 < lower <= upper < math.inf:
        raise UsageError(
            f"{call}: it reaches from {lower} to {upper}; drawn by its logarithm it needs bounds > 0. If "
            "these are exponents, pass the values themselves (1e-4, not -4)"
        )


class Domain:
    """What values a variable may have."""

    def sample(
        self, config: Any = None, size: int = 1, random_state: random.Random | int | None = None
    ) -> Any:
        """Draw a value.

        Args:
            config: what functions of `sample_from` are given; others don't look at it.
            size: how many; more than 1 gives a list.
            random_state: the generator to draw from, or a seed; None: no two calls draw alike.

        Returns:
            One value, or a list of `size` values.
        """
        generator = _generator(random_state)
        drawn = [self._draw(config, generator) for _ in range(size)]
        return drawn[0] if size == 1 else drawn

    def _draw(self, config: Any, generator: random.Random) -> Any:
        raise NotImplementedError

    def is_grid(self) -> bool:
        """Whether every value is tried, rather than one drawn."""
        return False

    def is_function(self) -> bool:
        """Whether a function of the user's gives the value."""
        return False

    def is_valid(self, value: Any) -> bool:
        """Whether a value lies within the domain; bounds count as within."""
        raise NotImplementedError

    @property
    def domain_str(self) -> str:
        """Its values, for people."""
        raise NotImplementedError


@dataclass(frozen=True)
class Float(Domain):
    """A real number.

    Attributes:
        lower: least value; None: there is none.
        upper: values are below it; None: there is none.
        drawn: evenly, evenly by their logarithm, or from a normal distribution.
        mean: of the normal distribution.
        sd: its standard deviation.
        q: values are multiples of it, and `upper` may be reached; None: any are.
    """

    lower: float | None = None
    upper: float | None = None
    drawn: Drawn = "uniform"
    mean: float = 0.0
    sd: float = 1.0
    q: float | None = None

    def __post_init__(self) -> None:
        call = type(self).__name__
        least = -math.inf if self.lower is None else _number(self.lower, "lower", call)
        most = math.inf if self.upper is None else _number(self.upper, "upper", call)
        if least > most:
            raise UsageError(
                f"a number between lower={self.lower} and upper={self.upper} was asked for; lower must not "
                "be above upper"
            )
        object.__setattr__(self, "lower", least)
        object.__setattr__(self, "upper", most)

    def _bounds(self) -> tuple[float, float]:
        assert self.lower is not None
        assert self.upper is not None
        return self.lower, self.upper

    def uniform(self) -> Float:
        """Drawn evenly: needs both bounds."""
        lower, upper = self._bounds()
        if not (math.isfinite(lower) and math.isfinite(upper)):
            raise UsageError(f"a number from {lower} to {upper} cannot be drawn evenly; give both bounds")
        return replace(self, drawn="uniform")

    def loguniform(self) -> Float:
        """Drawn evenly by its logarithm: needs bounds > 0."""
        _above_zero(*self._bounds(), "loguniform")
        return replace(self, drawn="loguniform")

    def normal(self, mean: float = 0.0, sd: float = 1.0) -> Float:
        """Drawn from a normal distribution: takes no bounds.

        Args:
            mean: its mean.
            sd: its standard deviation, > 0.
        """
        if any(map(math.isfinite, self._bounds())):
            raise UsageError(f"a normal distribution has no bounds; it was given {self.domain_str}")
        mean, sd = _number(mean, "mean", "normal"), _positive(sd, "sd", "normal")
        return replace(self, drawn="normal", mean=mean, sd=sd)

    def quantized(self, q: float) -> Float:
        """Values are multiples of `q`, which must divide the bounds; `upper` may be reached."""
        step = _positive(q, "q", "quantized")
        for name, bound in zip(("lower", "upper"), self._bounds(), strict=True):
            if math.isfinite(bound) and not math.isclose(bound / step, round(bound / step)):
                raise UsageError(
                    f"{name}={bound} is no multiple of q={q}; values are, so the bounds have to be, too"
                )
        return replace(self, q=step)

    def _draw(self, config: Any, generator: random.Random) -> float:
        lower, upper = self._bounds()
        if self.q is not None:
            lower = _index_on_grid(lower, self.q, math.ceil) * self.q
            upper = _index_on_grid(upper, self.q, math.floor) * self.q
        if self.drawn == "normal":
            # Box and Muller: two numbers a value, so that the stream is the same in every version of Python.
            radius = math.sqrt(-2.0 * math.log(1.0 - generator.random()))
            value = self.mean + self.sd * radius * math.cos(2.0 * math.pi * generator.random())
        elif self.drawn == "loguniform":
            least, most = math.log(lower), math.log(upper)
            value = min(max(math.exp(least + (most - least) * generator.random()), lower), upper)
        else:
            self.uniform()  # refuses a bound that is missing
            value = lower + (upper - lower) * generator.random()
        return self.rounded(value)

    def rounded(self, value: float) -> float:
        """The multiple of `q` that is nearest to a value; without `q` the value itself."""
        return float(value) if self.q is None else float(round(value / self.q) * self.q)

    def is_valid(self, value: Any) -> bool:
        lower, upper = self._bounds()
        return isinstance(value, Real) and lower <= float(value) <= upper

    @property
    def domain_str(self) -> str:
        return f"({self.lower}, {self.upper})"


@dataclass(frozen=True)
class Integer(Domain):
    """A whole number.

    Attributes:
        lower: least value.
        upper: values are below it.
        drawn: evenly, or evenly by their logarithm.
        q: values are multiples of it between the bounds, and `upper` may be reached unless it is 1; None:
            any are.
    """

    lower: int
    upper: int
    drawn: Drawn = "uniform"
    q: int | None = None

    def __post_init__(self) -> None:
        lower, upper = whole(self.lower, "lower", "Integer"), whole(self.upper, "upper", "Integer")
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "upper", upper)
        if lower >= upper and not (lower == upper and self.q is not None and self.q > 1):
            raise UsageError(
                f"a whole number from {lower} up to {upper}, not included, was asked for; upper must "
                "be above lower"
            )

    def uniform(self) -> Integer:
        """Drawn evenly."""
        return replace(self, drawn="uniform")

    def loguniform(self) -> Integer:
        """Drawn evenly by its logarithm: needs bounds > 0."""
        _above_zero(self.lower, self.upper, "lograndint")
        return replace(self, drawn="loguniform")

    def quantized(self, q: int) -> Integer:
        """Values are the multiples of `q` between the bounds; `upper` may be reached unless `q` is 1."""
        step = whole(q, "q", "quantized")
        if step < 1:
            raise UsageError(f"quantized: q is {q}; expected a whole number of at least 1")
        quantized = replace(self, q=step)
        least, most = quantized.indices()
        if most < least:
            raise UsageError(
                f"there is no multiple of q={q} between lower={self.lower} and upper={self.upper}"
            )
        return quantized

    def indices(self) -> tuple[int, int]:
        """Values are these and all whole numbers between them, times `q` or 1."""
        if self.q is None or self.q == 1:
            return self.lower, self.upper - 1
        return -(-self.lower // self.q), self.upper // self.q

    def _draw(self, config: Any, generator: random.Random) -> int:
        least, most = self.indices()
        if self.drawn == "loguniform":
            low, high = math.log(least), math.log(most + 1)
            index = math.floor(math.exp(low + (high - low) * generator.random()))
            index = min(max(index, least), most)
        else:
            index = generator.randrange(least, most + 1)
        return index * (self.q or 1)

    def is_valid(self, value: Any) -> bool:
        return isinstance(value, Real) and self.lower <= float(value) <= self.upper

    @property
    def domain_str(self) -> str:
        return f"({self.lower}, {self.upper})"


@dataclass(frozen=True)
class Categorical(Domain):
    """One of a list of things, which may be search spaces themselves.

    Attributes:
        categories: they.
        drawn: evenly, or "grid": every one is tried.
    """

    categories: Sequence[Any]
    drawn: Drawn = "uniform"

    def __post_init__(self) -> None:
        given = self.categories
        if isinstance(given, str | bytes | set | frozenset | Mapping) or not isinstance(given, Iterable):
            raise UsageError(
                f"choices are {given!r:.200} ({type(given).__name__}); expected a list: an order that is the "
                "same in every run. sorted(...) or list(...) makes one"
            )
        object.__setattr__(self, "categories", list(given))
        if not self.categories:
            raise UsageError("there is nothing to choose from: the list is empty; give at least one value")

    def uniform(self) -> Categorical:
        """Drawn evenly."""
        return replace(self, drawn="uniform")

    def grid(self) -> Categorical:
        """Every one is tried."""
        return replace(self, drawn="grid")

    def __len__(self) -> int:
        return len(self.categories)

    def __getitem__(self, item: int) -> Any:
        return self.categories[item]

    def __hash__(self) -> int:
        return hash((len(self.categories), self.drawn))

    def _draw(self, config: Any, generator: random.Random) -> Any:
        if self.is_grid():
            raise UsageError("a grid is walked through, not drawn from; use choice() to draw")
        return self.categories[generator.randrange(len(self.categories))]

    def is_grid(self) -> bool:
        return self.drawn == "grid"

    def is_valid(self, value: Any) -> bool:
        return any(value is category or bool(value == category) for category in self.categories)

    @property
    def domain_str(self) -> str:
        return f"{self.categories}"


@dataclass(frozen=True)
class Function(Domain):
    """What a function gives.

    Attributes:
        func: it; called with what is drawn already, or with nothing if it takes nothing.
        pass_config: whether it takes an argument.
    """

    func: Callable[..., Any]
    pass_config: bool = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.func):
            raise UsageError(f"sample_from takes a function; it was given {self.func!r:.200}")
        object.__setattr__(self, "pass_config", self._takes_argument())

    def _takes_argument(self) -> bool:
        try:
            shape = signature(self.func)
        except ValueError:  # some functions of C don't tell
            return True
        for arguments in ((None,), ()):
            try:
                shape.bind(*arguments)
            except TypeError:
                continue
            return bool(arguments)
        raise UsageError(
            f"the function {self.func!r:.100}{shape} cannot be called with the configuration alone; expected "
            "one that takes one argument, or none"
        )

    def _draw(self, config: Any, generator: random.Random) -> Any:
        return self.func(config) if self.pass_config else self.func()

    def is_function(self) -> bool:
        return True

    def is_valid(self, value: Any) -> bool:
        return True

    @property
    def domain_str(self) -> str:
        return f"{self.func}()"
