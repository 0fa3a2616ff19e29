"""What grows with the number of checkpoints, tensors and ranks, and how."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.overhead import many_checkpoints
from benchmarks.report import Bar, at_most, note, show_table, status
from benchmarks.settings import Settings
from benchmarks.simulated import SimulatedRanks
from keepstep.checkpoint.collector import collector_paused
from keepstep.checkpoint.keeping.catalog import checkpoint_name, scan
from keepstep.checkpoint.saving.layout import TensorInfo
from keepstep.checkpoint.saving.planner import Planner

__all__ = ["growth_per_10x", "run"]

_TIMES = 7
_GROWTH_LIMIT = 12.6
"""10 ** 1.1: as for small tensors, a little more than linear is let pass."""


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """Seconds by how many there were of what is counted."""

    what: str
    times_s: Mapping[int, float]


def run(settings: Settings) -> list[Bar]:
    """Print the table; return the bars."""
    curves = [_manifests(settings), *_plans(settings), *_ranks(settings)]
    rows = [
        (
            f"{count:,} {curve.what}",
            f"{seconds:.4f}",
            f"{seconds / count * 1e6:.1f}",
            f"{growth_per_10x(curve.times_s):.1f}x" if count == max(curve.times_s) else "",
        )
        for curve in curves
        for count, seconds in curve.times_s.items()
    ]
    show_table("Growth of processor time; 10x is linear", ("", "s", "us each", "per 10 times as many"), rows)
    note(
        f"Each simulated rank holds a shard of {settings.size.scale.sharded} tensors; their data is left out."
    )
    return [
        at_most(
            f"{curve.what}: growth per 10 times as many",
            growth_per_10x(curve.times_s),
            _GROWTH_LIMIT,
            "x",
            digits=1,
        )
        for curve in curves
    ]


def growth_per_10x(times_s: Mapping[int, float]) -> float:
    """By what the time is multiplied where there are ten times as many, from the first point to the last."""
    (few, few_s), (many, many_s) = min(times_s.items()), max(times_s.items())
    return math.pow(10, math.log10(many_s / few_s) / math.log10(many / few))


def _fastest_s(work: Callable[[], object]) -> float:
    """Of the processor, the least of several: whatever else runs on the machine would be taken for growth."""
    taken = []
    gc.collect()
    for _ in range(_TIMES):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return min(taken)


def _manifests(settings: Settings) -> _Curve:
    times_s = {}
    for count in settings.size.scale.manifests:
        root = settings.directory / f"{count}_checkpoints"
        with status(f"scale: {count:,} manifests"):
            many_checkpoints(root, count)
            times_s[count] = _fastest_s(lambda root=root: scan(root))  # type: ignore[misc]
    return _Curve(what="manifests read and checked", times_s=times_s)


def _plans(settings: Settings) -> list[_Curve]:
    first_s, again_s = {}, {}
    for count in settings.size.scale.tensors:
        tensors, same = _tensors(count), _tensors(count)
        planner = Planner()
        planner.plan(tensors)
        with status(f"scale: a plan of {count:,} tensors"), collector_paused():
            first_s[count] = _fastest_s(lambda tensors=tensors: Planner().plan(tensors))  # type: ignore[misc]
            again_s[count] = _fastest_s(lambda same=same, planner=planner: planner.plan(same))  # type: ignore[misc]
    return [
        _Curve(what="tensors planned", times_s=first_s),
        _Curve(what="tensors whose plan is kept", times_s=again_s),
    ]


def _tensors(count: int) -> list[TensorInfo]:
    """As of a model of small tensors, none of which shares memory; new objects at each call."""
    return [
        TensorInfo(
            address=f"model/blocks.{index // 10}.part_{index % 10}.weight",
            group="model",
            name=f"blocks.{index // 10}.part_{index % 10}.weight",
            dtype="float32",
            shape=(8, 8),
            itemsize=4,
            bytes=256,
            memory=(-1, index * 512),
            begin=index * 512,
            stride=(8, 1),
        )
        for index in range(count)
    ]


def _ranks(settings: Settings) -> list[_Curve]:
    """What rank 0 does for all: it decides, takes their reports and commits; and what each does to go on."""
    planned_s, committed_s, read_s = {}, {}, {}
    for count in settings.size.scale.ranks:
        ranks = SimulatedRanks(size=count, tensors=settings.size.scale.sharded)
        root = settings.directory / f"{count}_ranks"
        finals = (root / checkpoint_name(number) for number in itertools.count())
        with status(f"scale: {count:,} ranks"), collector_paused():
            planned_s[count] = _fastest_s(ranks.plan)
            reports = ranks.reports(ranks.plan())
            committed_s[count] = _fastest_s(lambda: ranks.commit(reports, next(finals)))  # noqa: B023
            final = root / checkpoint_name(0)
            read_s[count] = _fastest_s(lambda: ranks.read_back(final))  # noqa: B023
    return [
        _Curve(what="simulated ranks planned", times_s=planned_s),
        _Curve(what="simulated ranks committed", times_s=committed_s),
        _Curve(what="simulated ranks read back", times_s=read_s),
    ]
