"""The run that is killed and its twin, side by side; and the clean runs that time a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from examples.demo.kills import Kill, PlannedKill, kill_now
from examples.demo.screen import Bars
from examples.demo.training import Deadline, FinishedTooSoonError, Training

__all__ = ["StepTimes", "race", "time_steps"]

WARM_UP_STEPS = 10
TRIES = 3


def race(
    killed: Training, twin: Training, planned: Sequence[PlannedKill], bars: Bars, deadline: Deadline
) -> list[Kill]:
    """Run both to their end, killing one of them as planned.

    Should it get to its end before the last kill, as it may on a machine that stalls this process, it
    starts over.

    Returns:
        The kills, in order.
    """
    with twin.running():
        for tries_left in reversed(range(TRIES)):
            try:
                kills = _run_and_kill(killed, twin, planned, bars, deadline)
                break
            except FinishedTooSoonError as error:
                if not tries_left:
                    raise
                bars.say(f"{error} It starts over.")
                killed.start_over()
        while not twin.is_over():
            bars.show(twin.name, twin.attempt_step)
            deadline.pause(twin.name)
        bars.show(twin.name, twin.attempt_step)
    return kills


def _run_and_kill(
    killed: Training, twin: Training, planned: Sequence[PlannedKill], bars: Bars, deadline: Deadline
) -> list[Kill]:
    waiting, kills = deque(planned), list[Kill]()
    with killed.running():
        while not killed.is_over():
            if waiting and killed.attempt_step >= waiting[0].after_step:
                kills.append(kill_now(killed, waiting.popleft(), deadline))
                bars.say(f"SIGKILL {len(kills)} of {len(planned)} {kills[-1].in_words}")
                killed.start()
            twin.is_over()
            bars.show(killed.name, killed.attempt_step)
            bars.show(twin.name, twin.attempt_step)
            deadline.pause(killed.name)
        bars.show(killed.name, killed.attempt_step)
    if waiting:
        raise FinishedTooSoonError(f"{killed.name} finished before kill {len(kills) + 1}.")
    return kills


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """How long steps took.

    Attributes:
        steps: that were timed.
        median_ms: of their times, in milliseconds.
        p90_ms: the time that nine of ten stayed below.
    """

    steps: int
    median_ms: float
    p90_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> StepTimes:
        """Summarize times in milliseconds."""
        return cls(steps=len(times_ms), median_ms=median(times_ms), p90_ms=quantiles(times_ms, n=10)[-1])


def time_steps(
    place: Path, *, steps: int, rounds: int, bars: Bars, deadline: Deadline
) -> tuple[StepTimes, StepTimes]:
    """Time steps with nothing else running: without checkpoints, and with one at each step.

    Both kinds of run take turns, first one then the other way round, so that a machine that gets busier or
    hotter meanwhile slows both. The first steps of a run don't count, and neither does the last, after which
    both save.

    Returns:
        Without, and with.
    """
    times_ms: dict[bool, list[float]] = {False: [], True: []}
    turns = [
        saves for number in range(rounds) for saves in ((False, True) if number % 2 == 0 else (True, False))
    ]
    for number, saves in enumerate(turns):
        every = 1 if saves else steps
        run = Training("a timed run", place / f"run-{number}", epochs=1, batches=steps, save_every=every)
        with run.running():
            while not run.is_over():
                bars.show("timing", number * steps + run.attempt_step)
                deadline.pause(run.name, 0.05)
        clocks = [loss.clock_s for loss in run.losses[WARM_UP_STEPS:]]
        times_ms[saves] += [(after - before) * 1000 for before, after in pairwise(clocks)]
    bars.show("timing", len(turns) * steps)
    return StepTimes.of(times_ms[False]), StepTimes.of(times_ms[True])
