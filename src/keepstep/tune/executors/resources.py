"""Who holds which resources of this machine: pure bookkeeping.

Amounts are counted in ten-thousandths, so that ten times 0.1 is 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from keepstep.errors import UsageError

__all__ = ["Grant", "Pool", "PooledExecutor"]

_UNITS: Final = 10_000
GPU: Final = "gpu"


@dataclass(frozen=True, slots=True)
class Grant:
    """What one run holds.

    Attributes:
        units: {name: amount in ten-thousandths}.
        devices: {GPU: ten-thousandths of it}.
    """

    units: Mapping[str, int]
    devices: Mapping[str, int]


class Pool:
    """The resources of a machine, and what of them is free.

    Args:
        total: {"cpu": 8, "gpu": 2, ...}.
        devices: what each GPU is called in CUDA_VISIBLE_DEVICES; as many as `total` says, or () for 0, 1, ...
    """

    def __init__(self, total: Mapping[str, float], devices: Sequence[str] = ()) -> None:
        self.total = dict(total)
        gpus = int(total.get(GPU, 0))
        if devices and len(devices) != gpus:
            raise UsageError(
                f"There are {gpus} GPUs in total, but {len(devices)} names for them: {list(devices)}"
            )
        self._free = {name: _units(amount) for name, amount in total.items()}
        self._devices = dict.fromkeys(devices or [str(number) for number in range(gpus)], _UNITS)

    def grow(self, total: Mapping[str, float]) -> None:
        """There is at least this much in all now; what was there and is not in `total` stays."""
        for name, amount in total.items():
            more = _units(amount) - _units(self.total.get(name, 0.0))
            if more > 0:
                self.total[name] = amount
                self._free[name] = self._free.get(name, 0) + more
        for number in range(len(self._devices), int(self.total.get(GPU, 0))):
            self._devices[str(number)] = _UNITS

    def fits(self, resources: Mapping[str, float]) -> bool:
        """Whether these could be taken now."""
        wanted = {name: _units(amount) for name, amount in resources.items()}
        enough = all(units <= self._free.get(name, 0) for name, units in wanted.items())
        return enough and self._choose(wanted.get(GPU, 0)) is not None

    def why_never(self, resources: Mapping[str, float]) -> str | None:
        """Why these could not be taken if everything was free, for people; None: they could."""
        missing = [
            f"{amount:g} {name} "
            + (
                f"(there are {self.total[name]:g})"
                if name in self.total
                else f"(what there is: {', '.join(self.total)})"
            )
            for name, amount in resources.items()
            if _units(amount) > _units(self.total.get(name, 0.0))
        ]
        advice = "with tune.with_resources(trainable, {...})"
        if missing:
            return (
                f"it asks for {', '.join(missing)}, more than there is: ask for less {advice}, or run on a "
                "larger machine or a cluster"
            )
        gpus = _units(resources.get(GPU, 0.0))
        if gpus > _UNITS and gpus % _UNITS:
            return (
                f"it asks for {resources[GPU]:g} gpu: a part of one GPU can be held, or several whole ones; "
                f"ask for either {advice}"
            )
        return None

    def take(self, resources: Mapping[str, float]) -> Grant:
        """Take them.

        Raises:
            UsageError: they don't fit.
        """
        wanted = {name: _units(amount) for name, amount in resources.items() if amount}
        devices = self._choose(wanted.get(GPU, 0))
        if devices is None or any(units > self._free.get(name, 0) for name, units in wanted.items()):
            raise UsageError(f"{dict(resources)} was asked for, but only {self.free} is free of {self.total}")
        for name, units in wanted.items():
            self._free[name] -= units
        for device, units in devices.items():
            self._devices[device] -= units
        return Grant(wanted, devices)

    def give_back(self, grant: Grant) -> None:
        """It is free again."""
        for name, units in grant.units.items():
            self._free[name] += units
        for device, units in grant.devices.items():
            self._devices[device] += units

    @property
    def free(self) -> dict[str, float]:
        """What nobody holds."""
        return {name: units / _UNITS for name, units in self._free.items()}

    def _choose(self, units: int) -> dict[str, int] | None:
        """Which GPUs: whole ones that nobody shares, or a part of the fullest one with room for it."""
        if units <= 0:
            return {}
        if units < _UNITS:
            roomy = [(free, place) for place, free in enumerate(self._devices.values()) if free >= units]
            return {list(self._devices)[min(roomy)[1]]: units} if roomy else None
        count, part = divmod(units, _UNITS)
        whole = [device for device, free in self._devices.items() if free == _UNITS][:count]
        return dict.fromkeys(whole, _UNITS) if len(whole) == count and not part else None


class PooledExecutor:
    """What an `Executor` says of its resources, by the pool from which its trials take them.

    Args:
        pool: what there is.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def total(self) -> Mapping[str, float]:
        return dict(self._pool.total)

    def fits(self, resources: Mapping[str, float]) -> bool:
        return self._pool.fits(resources)

    def why_never(self, resources: Mapping[str, float]) -> str | None:
        return self._pool.why_never(resources)


def _units(amount: float) -> int:
    return round(amount * _UNITS)
