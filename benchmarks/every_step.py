"""What is left of a loop's throughput when it is saved at every step."""

from __future__ import annotations

import gc
import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.loops import AccelerateLoop, DcpLoop, KeepstepLoop, Loop, Segment, TorchLoop
from benchmarks.report import Bar, at_least, note, show_table, status
from benchmarks.settings import Point, Settings

__all__ = ["run", "samples_for"]

_AUTO = "keepstep, auto"
_PROBES = 3
_TRIES = 6
_CLOSE = 0.08
"""Of the samples of a step: so good a guess is taken."""
_BARS = ((1.0, 0.95, 0.97), (0.4, 0.90, 0.93))
"""Seconds of a step, the throughput that is promised there, and what is aimed at."""


@dataclass(kw_only=True)
class _Measured:
    """What was measured at one point of the curve, by the name of the loop."""

    point: Point
    plain_s: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    segments: dict[str, list[Segment]] = field(default_factory=lambda: defaultdict(list))

    @property
    def title(self) -> str:
        """The length of a step as it turned out."""
        return f"{statistics.median(self.plain_s):.2g} s"

    def ratio(self, name: str) -> str:
        ratios = self.ratios[name]
        if not ratios:
            return ""
        if len(ratios) == 1:
            return f"{ratios[0]:.3f}"
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return f"{median:.3f} ({low:.2f}-{high:.2f})"

    def times(self, name: str) -> str:
        segments = self.segments[name]
        if not segments:
            return ""
        blocked_s = statistics.median(segment.blocked_s for segment in segments)
        waited_s = statistics.median(segment.waited_s for segment in segments)
        return f"{blocked_s * 1e3:.1f} + {waited_s * 1e3:.1f}"


def run(settings: Settings) -> list[Bar]:
    """Print both tables; return the bars."""
    size, directory = settings.size.every_step, settings.directory
    automatic = KeepstepLoop(size, directory, "auto")
    others: list[Loop] = [
        KeepstepLoop(size, directory, "awaited"),
        KeepstepLoop(size, directory, "overlapped"),
        DcpLoop(size, directory),
        TorchLoop(size, directory, fsync=True),
        TorchLoop(size, directory, fsync=False),
        AccelerateLoop(size, directory, fsync=True),
        AccelerateLoop(size, directory, fsync=False),
    ]
    try:
        curve = list(_curve(size.points, automatic, others))
    finally:
        for loop in (automatic, *others):
            loop.close()
    _show(curve, [automatic, *others], sum(p.nbytes for p in automatic.model.parameters()) * 3)
    return _bars(curve)


def samples_for(step_s: float, took_s: Callable[[int], float], begin_with: int) -> int:
    """How many samples make a step of a given length.

    Args:
        step_s: the length.
        took_s: takes a step of so many samples, and says how long it took.
        begin_with: the first guess; it is corrected by what it took.
    """
    samples = begin_with
    for _ in range(_TRIES):
        better = max(1, round(samples * step_s / took_s(samples)))
        if abs(better - samples) <= _CLOSE * samples:
            return better
        samples = better
    return samples


def _curve(points: Sequence[Point], automatic: Loop, others: Sequence[Loop]) -> Iterator[_Measured]:
    """Each point is calibrated just before it is measured: a shared machine is faster now and slower then."""
    with status("every_step: warming up"):
        for loop in (automatic, *others):
            loop.run(1, 1, saving=True)
    samples = 1
    for point in points:
        with status(f"every_step: how many samples take {point.step_s:g} s"):
            samples = samples_for(point.step_s, lambda count: _probe(automatic, count), samples)
        yield _at(point, samples, automatic, others)


def _probe(loop: Loop, samples: int) -> float:
    return statistics.median(loop.run(samples, 1, saving=False).step_s for _ in range(_PROBES))


def _at(point: Point, samples: int, automatic: Loop, others: Sequence[Loop]) -> _Measured:
    """Each loop with saves between two segments of the very same one, memory and all, without."""
    measured = _Measured(point=point)
    for loop in (automatic, *others):
        before = _segment(loop, samples, point.steps, saving=False)
        rounds = point.rounds if loop is automatic else point.other_rounds
        for number in range(rounds):
            with status(f"every_step: {point.step_s:g} s, {loop.name}, round {number + 1} of {rounds}"):
                saved = _segment(loop, samples, point.steps, saving=True)
                after = _segment(loop, samples, point.steps, saving=False)
            measured.plain_s.append(after.step_s)
            measured.ratios[loop.name].append((before.step_s + after.step_s) / 2 / saved.step_s)
            measured.segments[loop.name].append(saved)
            before = after
    return measured


def _segment(loop: Loop, samples: int, steps: int, *, saving: bool) -> Segment:
    gc.collect()
    os.sync()  # nobody pays for what another left unwritten
    return loop.run(samples, steps, saving=saving)


def _show(curve: Sequence[_Measured], loops: Sequence[Loop], state_bytes: int) -> None:
    titles = [measured.title for measured in curve]
    rows = [(loop.name, loop.durable, *(m.ratio(loop.name) for m in curve)) for loop in loops]
    show_table(
        f"{state_bytes / 1e6:.0f} MB saved at every step: throughput relative to no checkpoints",
        ("step time without checkpoints:", "durable", *titles),
        rows,
    )
    rows = [(loop.name, *(m.times(loop.name) for m in curve)) for loop in loops]
    show_table("ms a step: in the call that saves + waiting in step() for the copy", ("", *titles), rows)
    note("(-): quartiles. What is promised, automatic saves, is measured most often.")
    note("'no': left to the page cache, which a power cut empties, and whose writing nobody is charged for.")
    note("'files': their data is fsynced by DCP, their names are not.")


def _bars(curve: Sequence[_Measured]) -> list[Bar]:
    bars = []
    for step_s, promised, aim in _BARS:
        for measured in curve:
            if measured.point.step_s == step_s:
                name = f"every step saved, {measured.title} each: throughput (aim {aim:g})"
                bars.append(at_least(name, statistics.median(measured.ratios[_AUTO]), promised, "", digits=3))
    return bars
