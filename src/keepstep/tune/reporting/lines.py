"""Progress as lines, for logs: what starts and what ends, and now and then how all of it stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from keepstep.tune.experiment.trial import ERROR, PAUSED, PENDING, RUNNING, TERMINATED, Trial
from keepstep.tune.reporting.base import Overview, ProgressReporter
from keepstep.tune.reporting.standard import write_out
from keepstep.tune.reporting.watch import Standing, Watch
from keepstep.tune.reporting.words import cut, duration, in_one_line, parameters, resources, value

__all__ = ["LinesReporter", "SilentReporter", "status_line", "time_left"]

_LOOK_EVERY_S: Final = 0.5
_SHARE: Final = 20
"""A look takes at most one in so many seconds."""
_AT_ONCE: Final = 20
"""Most lines of a kind at a time."""
_METRICS: Final = 4
_ERROR_CHARACTERS: Final = 300


def time_left(overview: Overview, standing: Standing) -> str | None:
    """How long it will take, from what it took so far; None: there is no telling yet."""
    left = (overview.expected_trials or 0) - standing.finished
    goes_on = any(standing.counts.get(status) for status in (PENDING, RUNNING, PAUSED))
    if left <= 0 or not goes_on or standing.finished < max(2, standing.counts.get(RUNNING, 0)):
        return None
    return duration(overview.elapsed_s / standing.finished * left)


def status_line(overview: Overview, standing: Standing, *, best: bool = True) -> str:
    """How all of it stands, in one line."""
    counts = standing.counts
    known = max(overview.expected_trials or 0, len(overview.trials))
    ended = f"{standing.finished:,} of {known:,} trials ended" if known else "no trials yet"
    others = [(name.lower(), counts.get(name, 0)) for name in ("RUNNING", "PAUSED", "PENDING")]
    parts = [ended, *(f"{count:,} {name}" for name, count in others if count)]
    parts += [f"{counts[ERROR]:,} error"] if counts.get(ERROR) else []
    if best and standing.best is not None and overview.metric is not None:
        parts.append(
            f"best {overview.metric} {value(standing.best.metric(overview.metric))} ({standing.best})"
        )
    parts.append(duration(overview.elapsed_s))
    left = time_left(overview, standing)
    parts += [f"about {left} left"] if left is not None else []
    held = resources(overview.used, overview.total)
    return " · ".join([*parts, held] if held else parts)


class SilentReporter(ProgressReporter):
    """Shows nothing."""

    def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
        return False

    def report(self, overview: Overview, done: bool) -> None:
        pass


class LinesReporter(ProgressReporter):
    """One line for each trial that starts, ends or fails, and every 30 s one for all.

    Args:
        write: takes whole lines; None: standard output, as it is when they are written.
        status_every_s: seconds between two lines about all of it.
    """

    def __init__(self, write: Callable[[str], object] | None = None, *, status_every_s: float = 30.0) -> None:
        self._write = write if write is not None else write_out
        self._status_every_s = status_every_s
        self._watch: Watch | None = None
        self._look_at = 0.0
        self._status_at = time.monotonic() + status_every_s

    def should_report(self, trials: Sequence[Trial], done: bool = False) -> bool:
        return done or time.monotonic() >= self._look_at

    def report(self, overview: Overview, done: bool) -> None:
        began = time.monotonic()
        first = self._watch is None
        if self._watch is None:
            self._watch = Watch(overview.metric, overview.mode)
        standing = self._watch.look(overview.trials)
        goes_on = first and not standing.counts.get(RUNNING) and standing.finished < len(overview.trials)
        lines = [f"goes on: {status_line(overview, standing)}"] if goes_on else []
        messages = [in_one_line(message) for message in overview.messages]
        lines += [] if done else messages
        for kind in ("started", "ended", "again", "failed"):
            lines += self._news([trial for trial, what in standing.news if what == kind], kind)
        lines += messages if done else []  # the last words are of all of it
        if done or began >= self._status_at:
            self._status_at = began + self._status_every_s
            lines.append(status_line(overview, standing))
        if done and standing.best is not None:
            lines.append(f"best: {standing.best}: {parameters(standing.best)} in {standing.best.path}")
        if lines:
            self._write("".join(f"[{overview.name}] {line}\n" for line in lines))
        taken = time.monotonic() - began
        self._look_at = began + max(_LOOK_EVERY_S, _SHARE * taken)

    def _news(self, trials: Sequence[Trial], kind: str) -> list[str]:
        lines = [self._line(trial, kind) for trial in trials[:_AT_ONCE]]
        more = len(trials) - _AT_ONCE
        words = {"again": "failed and are tried again"}.get(kind, kind)
        return [*lines, f"and {more:,} more {words}"] if more > 0 else lines

    def _line(self, trial: Trial, kind: str) -> str:
        if kind == "started":
            again = f" again, from iteration {trial.iteration}" if trial.starts > 1 else ""
            return f"{trial} started{again}: {parameters(trial)}".rstrip(": ")
        if kind == "ended":
            assert self._watch is not None
            names = self._watch.metrics([trial], _METRICS)
            found = [(name, trial.metric(name)) for name in names]
            told = " ".join(f"{name}={value(number)}" for name, number in found if number is not None)
            count = trial.training_iteration
            after = f"{count:,} iteration{'' if count == 1 else 's'}, {duration(trial.time_total_s)}"
            by = f" by {trial.stopped_by}" if trial.stopped_by is not None else ""
            return f"{trial} {TERMINATED}{by} after {after}: {told}".rstrip(": ")
        error = cut(in_one_line((trial.error or "").strip()), _ERROR_CHARACTERS)
        if kind == "again":
            return f"{trial} failed (failure {trial.num_failures}) and is tried again: {error}"
        return f"{trial} {ERROR}: {error} (see {trial.path}/error.txt)"
