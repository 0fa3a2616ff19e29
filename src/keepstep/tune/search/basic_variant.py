"""`BasicVariantGenerator`: grids and random search, as they are if no other searcher is asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Literal

from keepstep.errors import UsageError
from keepstep.tune.search.base import Searcher
from keepstep.tune.search.space import Path, shown, variable
from keepstep.tune.search.variants import Variant, count, sampling, variants

__all__ = ["BasicVariantGenerator", "with_point"]


class BasicVariantGenerator(Searcher):
    """Every combination of the grids, `num_samples` times, with everything else drawn at random.

    Variants come in the order of `ray.tune`: grids by their paths, the first changing fastest. They are made
    one at a time, so the ten-thousandth costs what the first did.

    Args:
        points_to_evaluate: configurations to try first, complete or in part: what one does not say is drawn,
            or walked through if it is a grid. Each takes the place of one of the `num_samples`.
        max_concurrent: most trials at a time; 0: as many as resources allow.
        constant_grid_search: draw once a sample, and keep what was drawn for the whole grid; False: draw anew
            for each of its combinations.
        random_state: a seed, or a generator of numpy that one is taken from; None: the experiment's seed.

    Raises:
        UsageError: an argument is none of these.
    """

    counts_samples = True

    def __init__(
        self,
        points_to_evaluate: Sequence[Mapping[str, Any]] | None = None,
        max_concurrent: int = 0,
        constant_grid_search: bool = False,
        random_state: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(max_concurrent, bool) or not isinstance(max_concurrent, int) or max_concurrent < 0:
            raise UsageError(
                f"BasicVariantGenerator.max_concurrent is {max_concurrent!r}; expected a whole number of at "
                "least 1, or 0 for no limit"
            )
        self.points_to_evaluate = checked_points(points_to_evaluate)
        self.max_concurrent = max_concurrent
        self.constant_grid_search = constant_grid_search
        self._own_seed = _seed_of(random_state)
        self._seed = self._own_seed
        self._spaces: list[Any] = []
        self._space: Any = None
        self._num_samples = 1
        self._rest: Iterator[Variant] | None = None
        self._running: set[str] = set()
        self._evaluated: dict[str, dict[str, Any]] = {}

    def describe(self) -> dict[str, Any]:
        return {
            "points_to_evaluate": self.points_to_evaluate or None,
            "max_concurrent": self.max_concurrent,
            "constant_grid_search": self.constant_grid_search,
            "random_state": self._own_seed,
        }

    def set_seed(self, seed: int) -> None:
        if self._own_seed is None:
            self._seed = seed

    def set_search_properties(
        self,
        metric: str | None,
        mode: Literal["min", "max"] | None,
        config: Mapping[str, Any],
        *,
        num_samples: int = 1,
        **spec: Any,
    ) -> bool:
        """Begin anew, with this search space, sampled that often.

        Args:
            metric: not looked at.
            mode: likewise.
            config: the experiment's `param_space`.
            num_samples: as in `TuneConfig`; -1: without end.
            spec: more that may be said one day.

        Raises:
            UsageError: `points_to_evaluate` has a key that `config` has not.
        """
        self._rest = None
        self._running, self._evaluated = set(), {}
        self._space = dict(config)
        self._num_samples = num_samples
        self._spaces = [
            with_point(self._space, point, name=f"points_to_evaluate[{at}]", messages=self.messages)
            for at, point in enumerate(self.points_to_evaluate)
        ]
        count(self._space)  # refuses an empty grid now, not after hours
        return super().set_search_properties(metric, mode, config, **spec)

    @property
    def total_samples(self) -> int | None:
        if self._space is None or self._num_samples < 0:
            return None
        further = max(0, self._num_samples - len(self._spaces))
        counts = [count(space) for space in self._spaces]
        if further:
            each = count(self._space)
            counts.append(None if each is None else each * further)
        return None if None in counts else sum(number for number in counts if number is not None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.max_concurrent and len(self._running) >= self.max_concurrent:
            return None
        if self._rest is None:
            self._rest = self._variants()
        variant = next(self._rest, None)
        if variant is None:
            return self.FINISHED
        self._running.add(trial_id)
        self._evaluated[trial_id] = variant.evaluated
        config: dict[str, Any] = variant.config
        return config

    def _variants(self) -> Iterator[Variant]:
        if self._space is None:
            raise UsageError(
                "BasicVariantGenerator was asked for a configuration before it was told param_space"
            )
        draw = sampling(random.Random(self._seed))  # noqa: S311
        further = self._num_samples - len(self._spaces)
        more = repeat(self._space) if self._num_samples < 0 else repeat(self._space, max(0, further))
        for space in chain(self._spaces, more):
            yield from variants(space, draw, constant_grid_search=self.constant_grid_search)

    def evaluated(self, trial_id: str) -> dict[str, Any]:
        return self._evaluated.get(trial_id, {})

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self._running.discard(trial_id)


def checked_points(points: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """`points_to_evaluate` as a list of dicts.

    Raises:
        UsageError: they are something else.
    """
    given = [] if points is None else points
    if isinstance(given, list | tuple) and all(isinstance(point, Mapping) for point in given):
        return [dict(point) for point in given]
    raise UsageError(f"points_to_evaluate is {points!r:.200}; expected a list of dicts, each a configuration")


def with_point(
    space: Any, point: Mapping[str, Any], *, name: str, messages: list[str], path: Path = ()
) -> Any:
    """A search space in which some things are fixed.

    Args:
        space: a dict.
        point: what is fixed.
        name: of the point, for messages.
        messages: values that the space does not hold are told here.
        path: where the space lies in a larger one.

    Raises:
        UsageError: the point has a key that the space has not.
    """
    changed = dict(space)
    for key, value in point.items():
        here = (*path, key)
        if key not in space:
            raise UsageError(
                f"{name} has {shown(here)!r}, and param_space has not; it has: "
                f"{', '.join(repr(shown((*path, known))) for known in space)}"
            )
        below = space[key]
        found = variable(below)
        if found is None and isinstance(below, dict) and isinstance(value, Mapping):
            changed[key] = with_point(below, value, name=name, messages=messages, path=here)
            continue
        if variable(value) is None and not _fits(below, value):
            held = repr(below) if found is None else found.domain_str
            messages.append(
                f"{name} says {shown(here)}={value!r:.100}, which param_space does not hold: {held:.200}; "
                "it is tried all the same"
            )
        changed[key] = value
    return changed


def _fits(below: Any, value: Any) -> bool:
    found = variable(below)
    return found.is_valid(value) if found is not None else bool(below == value)


def _seed_of(random_state: Any) -> int | None:
    if random_state is None or (isinstance(random_state, int) and not isinstance(random_state, bool)):
        return random_state
    if isinstance(random_state, random.Random):
        return random_state.getrandbits(63)
    draw = getattr(random_state, "integers", None) or getattr(random_state, "randint", None)
    if callable(draw):
        return int(draw(2**31 - 1))
    raise UsageError(
        f"BasicVariantGenerator.random_state is {random_state!r:.100}; expected a seed, a generator of "
        "numpy, or None"
    )
