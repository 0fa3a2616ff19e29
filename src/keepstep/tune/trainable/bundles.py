"""`PlacementGroupFactory`: what a trial holds while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keepstep.errors import UsageError

__all__ = ["PlacementGroupFactory", "resource_dict_to_pg_factory"]


class PlacementGroupFactory:
    """The resources of a trial, in bundles: the trial's own, then those of processes that it starts.

    On one machine a trial holds the sum of its bundles. On a cluster each bundle lies on one node.

    Args:
        bundles: [{"CPU": 1, "GPU": 0.5, "licence": 1}, {"CPU": 2}]; the first may be {}.
        strategy: "PACK", "SPREAD", "STRICT_PACK" or "STRICT_SPREAD"; of no effect on one machine.

    Raises:
        UsageError: no bundle, an amount that is no number of at least 0, or an unknown strategy.
    """

    _STRATEGIES: Final = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")

    def __init__(self, bundles: Sequence[Mapping[str, float]], strategy: str = "PACK") -> None:
        if not bundles or not all(isinstance(bundle, Mapping) for bundle in bundles):
            raise UsageError(
                f"PlacementGroupFactory takes a list of at least one bundle, as [{{'CPU': 1}}]; it was given "
                f"{bundles!r}"
            )
        if strategy not in self._STRATEGIES:
            raise UsageError(
                f"The strategy of a PlacementGroupFactory is {strategy!r}; allowed are "
                f"{', '.join(self._STRATEGIES)}"
            )
        self._bundles = [_amounts(bundle) for bundle in bundles]
        self._strategy = strategy

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Each bundle, without what is 0."""
        return [dict(bundle) for bundle in self._bundles]

    @property
    def strategy(self) -> str:
        """How bundles lie on the nodes of a cluster."""
        return self._strategy

    @property
    def head_bundle_is_empty(self) -> bool:
        """Whether the trial itself holds nothing."""
        return not self._bundles[0]

    @property
    def head_cpus(self) -> float:
        """The CPUs of the trial itself."""
        return self._bundles[0].get("CPU", 0.0)

    @property
    def required_resources(self) -> dict[str, float]:
        """All bundles together."""
        total: dict[str, float] = {}
        for bundle in self._bundles:
            for name, amount in bundle.items():
                total[name] = total.get(name, 0.0) + amount
        return total

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PlacementGroupFactory):
            return NotImplemented
        return (self._bundles, self._strategy) == (other._bundles, other._strategy)

    def __hash__(self) -> int:
        return hash((tuple(tuple(sorted(bundle.items())) for bundle in self._bundles), self._strategy))

    def __repr__(self) -> str:
        return f"PlacementGroupFactory({self._bundles}, strategy={self._strategy!r})"


def _amounts(bundle: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, amount in bundle.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
            raise UsageError(
                f"A trial's resources ask for {name}={amount!r}; expected a number of at least 0, as 2 or 0.5"
            )
        name = {"cpu": "CPU", "gpu": "GPU"}.get(name, name)
        if amount:
            found[name] = found.get(name, 0.0) + float(amount)
    gpus = found.get("GPU", 0.0)
    if gpus > 1 and not gpus.is_integer():
        raise UsageError(
            f"A trial's resources ask for {gpus} GPUs; expected a whole number, or a fraction of one"
        )
    return found


def resource_dict_to_pg_factory(spec: Mapping[str, Any] | None = None) -> PlacementGroupFactory:
    """One bundle from {"cpu": 2, "gpu": 0.5, "licence": 1}.

    Args:
        spec: None or {}: one CPU. `custom_resources` may hold others, as a dict.
    """
    told = dict(spec or {"cpu": 1})
    told.update(told.pop("custom_resources", {}))
    return PlacementGroupFactory([told])
