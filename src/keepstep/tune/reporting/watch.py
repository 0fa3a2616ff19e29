"""What there is to tell of many trials, at a cost that does not grow with those that have ended."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from keepstep.tune.experiment.trial import ERROR, FINISHED, PAUSED, PENDING, RUNNING, TERMINATED, Trial
from keepstep.tune.result import AUTOMATIC_FIELDS

__all__ = ["Standing", "Watch"]

_KEPT: Final = 200
_FAILURES_KEPT: Final = 200


@dataclass(kw_only=True, slots=True)
class Standing:
    """How trials stand.

    Attributes:
        counts: {status: how many}.
        running: trials that run.
        paused: trials that are paused.
        pending: the first of those that wait.
        best: the best so far, by the metric.
        ended: the best of those that ended, the best first; without a metric the last ones.
        failed: the last trials that failed for good.
        news: what happened since the last look: (trial, "started" | "ended" | "failed" | "again").
    """

    counts: Mapping[str, int]
    running: Sequence[Trial]
    paused: Sequence[Trial]
    pending: Sequence[Trial]
    best: Trial | None
    ended: Sequence[Trial]
    failed: Sequence[Trial]
    news: Sequence[tuple[Trial, str]]

    @property
    def finished(self) -> int:
        """How many have ended."""
        return sum(self.counts.get(status, 0) for status in FINISHED)


@dataclass(slots=True)
class _Live:
    """A trial that had not ended when it was looked at last."""

    trial: Trial
    starts: int = 0
    failures: int = 0


@dataclass(slots=True)
class Watch:
    """Looks at all trials, again and again. Those that ended are looked at once.

    Args:
        metric: what counts; None: nothing does.
        mode: "min" or "max".
    """

    metric: str | None = None
    mode: str | None = None
    _seen: int = 0
    _live: dict[str, _Live] = field(default_factory=dict)
    _ended: Counter[str] = field(default_factory=Counter)
    _top: list[tuple[tuple[float, ...], int, Trial]] = field(default_factory=list)
    _failed: list[Trial] = field(default_factory=list)
    _names: dict[str, None] = field(default_factory=dict)
    _first: bool = True

    def look(self, trials: Sequence[Trial]) -> Standing:
        """How they stand now."""
        for trial in trials[self._seen :]:
            self._live[trial.trial_id] = self._known(trial)
        self._seen = len(trials)
        news: list[tuple[Trial, str]] = []
        by_status: dict[str, list[Trial]] = {}
        for live in list(self._live.values()):
            self._compare(live, news)
            status = RUNNING if live.trial.saves_last else live.trial.status
            by_status.setdefault(status, []).append(live.trial)
            if live.trial.is_finished() and not live.trial.saves_last:
                self._take_ended(live.trial)
        self._first = False
        counts = self._ended + Counter(
            {status: len(found) for status, found in by_status.items() if status not in FINISHED}
        )
        running, paused = by_status.get(RUNNING, []), by_status.get(PAUSED, [])
        ended = [trial for _, _, trial in sorted(self._top, key=lambda item: item[:2], reverse=True)]
        return Standing(
            counts=counts,
            running=running,
            paused=paused,
            pending=by_status.get(PENDING, [])[:_KEPT],
            best=self._best([*ended[:1], *running, *paused]),
            ended=ended,
            failed=self._failed,
            news=news,
        )

    def metrics(self, shown: Sequence[Trial], most: int) -> list[str]:
        """Names of metrics that are numbers, the one that counts first, in the order they were seen."""
        for trial in shown:
            for name, found in trial.last_result.items():
                if name not in AUTOMATIC_FIELDS and isinstance(found, int | float) and len(self._names) < 100:
                    self._names.setdefault(name)
        first = [self.metric] if self.metric is not None else []
        return [*first, *(name for name in self._names if name != self.metric)][: max(most, len(first))]

    def rank(self, trial: Trial) -> tuple[float, ...]:
        """Sorts trials from worst to best; without a metric from the first to the last."""
        if self.metric is None or self.mode is None:
            return (1.0, float(trial.number))
        found = trial.metric(self.metric)
        if not isinstance(found, int | float) or math.isnan(found):
            return (0.0, 0.0)
        return (1.0, -found if self.mode == "min" else found)

    def _known(self, trial: Trial) -> _Live:
        """What was so when the first look was taken, as after a restart, is no news."""
        if self._first and trial.status != RUNNING:
            return _Live(trial, trial.starts, trial.num_failures)
        return _Live(
            trial, max(0, trial.starts - 1) if self._first else 0, trial.num_failures if self._first else 0
        )

    def _compare(self, live: _Live, news: list[tuple[Trial, str]]) -> None:
        trial = live.trial
        if trial.starts > live.starts:
            news.append((trial, "started"))
        if trial.num_failures > live.failures:
            news.append((trial, "failed" if trial.status == ERROR else "again"))
        if trial.status == TERMINATED and trial.starts > 0 and not (self._first or trial.saves_last):
            news.append((trial, "ended"))
        live.starts, live.failures = trial.starts, trial.num_failures

    def _take_ended(self, trial: Trial) -> None:
        del self._live[trial.trial_id]
        self._ended[trial.status] += 1
        if trial.status == ERROR:
            self._failed = [*self._failed[-_FAILURES_KEPT + 1 :], trial]
        item = (self.rank(trial), -trial.number, trial)
        if len(self._top) < _KEPT:
            heapq.heappush(self._top, item)
        elif item[:2] > self._top[0][:2]:
            heapq.heapreplace(self._top, item)

    def _best(self, candidates: Sequence[Trial]) -> Trial | None:
        if self.metric is None or self.mode is None:
            return None
        found: Any = max(candidates, key=self.rank, default=None)
        best: Trial | None = found
        return best if best is not None and self.rank(best)[0] else None
